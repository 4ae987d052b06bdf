-- One row per gateway's report, account and reason of requests that were answered with an error.
create view refusals as
select
    from_at_ns,
    to_at_ns,
    gateway,
    shard,
    account,
    reason,
    count,
    position
from facts.counted_refusals;
