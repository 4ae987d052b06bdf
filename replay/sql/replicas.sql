-- One row per replica.
create view replicas as
select
    replica,
    min(model) as model,
    case
        when bool_or(event = 'lost') then 'lost'
        when bool_or(event = 'stopped') then 'stopped'
        when bool_or(event = 'draining') then 'draining'
        when bool_or(event in ('ready', 'reported')) then 'ready'
        else 'starting'
    end as state,
    max(engine) as engine,
    max(hardware) as hardware,
    coalesce(max(gpus), 0) as gpus,
    max(slots) as slots,
    max(context_tokens) as context_tokens,
    arg_max(running, rowid) filter (where event = 'reported') as running,
    arg_max(waiting, rowid) filter (where event = 'reported') as waiting,
    arg_max(kv_used_tokens, rowid) filter (where event = 'reported') as kv_used_tokens,
    max(why) as why,
    min(at_ns) as first_seen_at_ns,
    min(at_ns) filter (where event = 'ready') as ready_at_ns,
    max(at_ns) as last_seen_at_ns,
    min(at_ns) filter (where event in ('stopped', 'lost')) as ended_at_ns
from facts.replica_events
group by replica;
