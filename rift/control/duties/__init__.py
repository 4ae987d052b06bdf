"""What the leader does in the background.

janitor            ends what no living process will end
supervision        the janitor's rules: what is due, and when
autoscaler         decides how many replicas each model has
archiver           seals segments and trims the log
credit_settlement  settles what lost gateways held of an account's credit
key_erasure        erases the keys of sealed content
period_close       makes a month's invoices final
"""
