-- One row per model and hour (UTC) in which a replica lived or a request ended.
create view unit_economics as
with folded as (
    select max(stored_at_ns) as at_ns from facts.applied
),
-- A replica starts, from its decision or else its first event, until it is ready, and lives until its end. If neither is known, the largest folded time counts.
lives as (
    select
        replica,
        model,
        gpus,
        hour_nanousd,
        coalesce(ordered_at_ns, first_seen_at_ns) as from_ns,
        coalesce(ended_at_ns, greatest(folded.at_ns, last_seen_at_ns)) as to_ns,
        least(coalesce(ready_at_ns, to_ns), to_ns) as ready_ns
    from replicas
    cross join folded
),
ran as (
    select
        lives.replica,
        greatest(attempts.started_at_ns, lives.ready_ns) as from_ns,
        least(coalesce(attempts.ended_at_ns, lives.to_ns), lives.to_ns) as to_ns
    from attempts
    join lives on lives.replica = attempts.worker
),
marked as (
    select *, from_ns > coalesce(max(to_ns) over (
        partition by replica order by from_ns, to_ns rows between unbounded preceding and 1 preceding
    ), -1) as is_first
    from ran
    where from_ns < to_ns
),
numbered as (
    select *, sum(is_first::integer) over (
        partition by replica order by from_ns, to_ns rows unbounded preceding
    ) as number
    from marked
),
spans as (
    select replica, 'starting' as activity, from_ns, ready_ns as to_ns from lives
    union all
    select replica, 'ready', ready_ns, to_ns from lives
    union all
    select replica, 'busy', min(from_ns), max(to_ns) from numbered group by replica, number
),
by_hour as (
    select *, unnest(range(from_ns // 3600000000000, (to_ns - 1) // 3600000000000 + 1)) as hour
    from spans
    where from_ns < to_ns
),
pieces as (
    select
        model,
        hour,
        activity,
        gpus,
        hour_nanousd,
        least(by_hour.to_ns, (hour + 1) * 3600000000000)
            - greatest(by_hour.from_ns, hour * 3600000000000) as ns
    from by_hour
    join lives using (replica)
),
used as (
    select
        model,
        hour,
        sum(ns) filter (where activity <> 'busy') as ns,
        coalesce(sum(ns) filter (where activity = 'starting'), 0) as starting_ns,
        coalesce(sum(ns) filter (where activity = 'busy'), 0) as busy_ns,
        sum(ns * gpus) filter (where activity <> 'busy') as gpu_ns,
        coalesce(sum(ns * gpus) filter (where activity = 'starting'), 0) as starting_gpu_ns,
        coalesce(sum(ns * gpus) filter (where activity = 'busy'), 0) as busy_gpu_ns,
        sum(ns::hugeint * hour_nanousd) filter (where activity <> 'busy') as cost,
        coalesce(sum(ns::hugeint * hour_nanousd) filter (where activity = 'starting'), 0) as starting_cost,
        coalesce(sum(ns::hugeint * hour_nanousd) filter (where activity = 'busy'), 0) as busy_cost
    from pieces
    group by model, hour
),
revenue as (
    select
        model,
        finished_at_ns // 3600000000000 as hour,
        count(*) as requests,
        sum(prompt_tokens) as prompt_tokens,
        sum(output_tokens) as output_tokens,
        sum(coalesce(shares.nanousd, charge_nanousd)) as revenue_nanousd
    from facts.ended_requests
    left join shares using (request_id, account, model)
    group by model, hour
),
-- The total, starting and busy are rounded down once per model and hour; idle is the difference.
in_seconds as (
    select
        model,
        make_timestamp(hour * 3600000000) as hour,
        coalesce(ns, 0) // 1000000000 as replica_seconds,
        coalesce(starting_ns, 0) // 1000000000 as starting_replica_seconds,
        coalesce(busy_ns, 0) // 1000000000 as busy_replica_seconds,
        coalesce(gpu_ns, 0) // 1000000000 as gpu_seconds,
        coalesce(starting_gpu_ns, 0) // 1000000000 as starting_gpu_seconds,
        coalesce(busy_gpu_ns, 0) // 1000000000 as busy_gpu_seconds,
        coalesce(cost, 0) // 3600000000000 as cost_nanousd,
        coalesce(starting_cost, 0) // 3600000000000 as starting_nanousd,
        coalesce(busy_cost, 0) // 3600000000000 as busy_nanousd,
        coalesce(requests, 0) as requests,
        coalesce(prompt_tokens, 0) as prompt_tokens,
        coalesce(output_tokens, 0) as output_tokens,
        coalesce(revenue_nanousd, 0) as revenue_nanousd
    from used
    full join revenue using (model, hour)
)
select
    model,
    hour,
    replica_seconds,
    starting_replica_seconds,
    busy_replica_seconds,
    replica_seconds - starting_replica_seconds - busy_replica_seconds as idle_replica_seconds,
    gpu_seconds,
    starting_gpu_seconds,
    busy_gpu_seconds,
    gpu_seconds - starting_gpu_seconds - busy_gpu_seconds as idle_gpu_seconds,
    cost_nanousd,
    starting_nanousd,
    busy_nanousd,
    cost_nanousd - starting_nanousd - busy_nanousd as idle_nanousd,
    requests,
    prompt_tokens,
    output_tokens,
    revenue_nanousd,
    revenue_nanousd - cost_nanousd as margin_nanousd
from in_seconds;
