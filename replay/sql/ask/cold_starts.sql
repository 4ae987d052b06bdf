-- Show each start of a replica, newest first, and the requests that had to wait for it
-- since (time, default 24h): replicas that began since then
-- model (text, optional): only this model
with begun as (
    select *, coalesce(ordered_at_ns, first_seen_at_ns) as began_at_ns
    from replicas
    where began_at_ns >= $since and model = coalesce($model, model)
),
waited as (
    select
        worker as replica,
        count(*) as requests,
        max(requests.started_at_ns - accepted_at_ns) as longest_ns
    from attempts
    join begun on begun.replica = attempts.worker
    join requests using (request_id)
    where number = 1 and accepted_at_ns < begun.ready_at_ns
    group by worker
),
others as (
    select begun.replica, count(*) as ready
    from begun
    join replicas as other on other.model = begun.model
        and other.ready_at_ns <= begun.began_at_ns
        and coalesce(other.ended_at_ns > begun.began_at_ns, true)
    group by begun.replica
)
select
    replica,
    model,
    hardware,
    state,
    began_at_ns,
    (ready_at_ns - began_at_ns) // 1000000 as start_ms,
    coalesce(others.ready, 0) as others_ready,
    coalesce(waited.requests, 0) as requests_waited,
    waited.longest_ns // 1000000 as longest_wait_ms,
    why
from begun
left join waited using (replica)
left join others using (replica)
order by began_at_ns desc, replica
