-- One row per replica.
create view replicas as
with ended as (
    select
        replica,
        min(at_ns) as at_ns,
        unnest(arg_min({'state': event, 'why': why, 'lived_ns': lived_ns}, rowid))
    from facts.replica_events
    where event in ('stopped', 'lost')
    group by replica
),
lived as (
    select
        replica,
        min(model) as model,
        bool_or(event = 'draining') as is_draining,
        max(engine) as engine,
        max(hardware) as hardware,
        coalesce(max(gpus), 0) as gpus,
        coalesce(max(hour_nanousd), 0) as hour_nanousd,
        max(slots) as slots,
        max(context_tokens) as context_tokens,
        arg_max(running, rowid) filter (where event = 'reported') as running,
        arg_max(waiting, rowid) filter (where event = 'reported') as waiting,
        arg_max(kv_used_tokens, rowid) filter (where event = 'reported') as kv_used_tokens,
        min(ordered_at_ns) as ordered_at_ns,
        min(at_ns) as first_seen_at_ns,
        min(at_ns) filter (where event = 'ready') as ready_at_ns,
        max(at_ns) as last_seen_at_ns
    from facts.replica_events
    group by replica
)
select
    replica,
    model,
    case
        when ended.state is not null then ended.state
        when is_draining then 'draining'
        when ready_at_ns is not null then 'ready'
        else 'starting'
    end as state,
    engine,
    hardware,
    gpus,
    hour_nanousd,
    slots,
    context_tokens,
    running,
    waiting,
    kv_used_tokens,
    ended.why,
    ordered_at_ns,
    first_seen_at_ns,
    ready_at_ns,
    last_seen_at_ns,
    ended.at_ns as ended_at_ns,
    ended.at_ns - first_seen_at_ns as lifetime_ns,
    ended.lived_ns
from lived
left join ended using (replica);
