"""Who may ask for what. Everything that is refused is refused here, before anything is stored.

admission       keys, models, queue and room
reservation     what a request holds before it is accepted
book_freshness  whether the book is current enough to trust
rate_window     sliding-window limits: pure
rate_limits     the limits of accounts and keys at this gateway
max_cost        the most that a request can cost
metering        what a request did cost
credit_hold     one hold of this lane
credit          what may be spent for accounts with credit or a budget
"""
