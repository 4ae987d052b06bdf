-- One row per account; only its first opening counts.
create view accounts as
select
    account,
    min(at_ns) as opened_at_ns,
    arg_min(position, rowid) as position
from facts.opened_accounts
group by account;
