"""Which requests are accepted. Everything is refused here, before anything is stored.

auth            API keys: validity, scopes, models
admission       whether a new request is admitted
request_size    what a request counts as, known without a tokenizer: pure
reservation     the resources of a request before it is accepted
queue_share     how many requests may wait for a model
log_share       how much of the log one account may take
log_room        whether new requests can be stored
book_freshness  whether the book is current enough to trust
key_limits      how many keys the log may hold for one account
rate_limits     the rate limits of accounts and keys at this gateway
rate_window     sliding-window limits: pure
credit          credit of each request: reserved, then spent
lane_credit     the credit that this lane holds
credit_hold     one hold of this lane, and what requests spend of it
max_cost        the highest cost of a new request
"""
