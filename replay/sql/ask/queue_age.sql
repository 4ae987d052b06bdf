-- Show by model how many requests wait, at first or for another attempt, and for how long the oldest has waited
-- at (time, default now): as of this time
-- model (text, optional): only this model
with pending as (
    select request_id, model, account, accepted_at_ns from requests
    where accepted_at_ns <= $at
        and coalesce(finished_at_ns > $at, true)
        and model = coalesce($model, model)
),
ran as (
    select request_id, max(coalesce(ended_at_ns, $at + 1)) as until_ns
    from attempts
    join pending using (request_id)
    where started_at_ns <= $at
    group by request_id
),
waiting as (
    select pending.*, coalesce(until_ns, accepted_at_ns) as since_ns
    from pending
    left join ran using (request_id)
    where coalesce(until_ns, 0) <= $at
)
select
    model,
    count(*) as waiting,
    count(distinct account) as accounts,
    quantile_disc($at - since_ns, 0.5) // 1000000 as wait_p50_ms,
    max($at - since_ns) // 1000000 as oldest_ms,
    arg_min(account, since_ns) as oldest_account,
    arg_min(request_id, since_ns) as oldest_request_id
from waiting
group by model
order by oldest_ms desc, model
