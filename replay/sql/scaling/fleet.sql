-- One row per event of the fleet that changes who leads, what is wanted or how a replica is, in the stream's order.
with told as (
    select position, at_ns, event, model, replica, start_ns, null as epoch, null as control, null as from_replicas,
        null as to_replicas, null as decided_at_ns, null as positions
    from facts.replica_events
    where event <> 'reported'
    union all
    select position, at_ns, 'decided', model, null, null, epoch, null, from_replicas, to_replicas, decided_at_ns, positions
    from facts.scale_decisions
    union all
    select position, at_ns, 'elected', null, null, null, epoch, control, null, null, null, null
    from facts.held_elections
)
select *, split_part(split_part(position, ':', 2), '.', 1)::bigint as sequence
from told
order by sequence, split_part(position, '.', 2)::bigint;
