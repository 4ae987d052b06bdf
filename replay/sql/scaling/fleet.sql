-- One row per event that changes the leader, a decision or the state of a replica, in the stream's order.
with fleet_events as (
    select position, at_ns, event, model, replica, start_ns, null as epoch, null as control, null as from_replicas,
        null as to_replicas, null as decided_at_ns, null as positions, null as is_missed, null as policy
    from facts.replica_events
    where event <> 'reported'
    union all
    select position, at_ns, 'decided', model, null, null, epoch, null, from_replicas, to_replicas, decided_at_ns, positions, null, null
    from facts.scale_decisions
    union all
    select position, at_ns, 'planned', model, null, null, epoch, null, floor, restart, planned_at_ns, null, is_missed, policy
    from facts.scale_plans
    union all
    select position, at_ns, 'elected', null, null, null, epoch, control, null, null, null, null, null, null
    from facts.held_elections
)
select *, split_part(split_part(position, ':', 2), '.', 1)::bigint as sequence
from fleet_events
order by sequence, split_part(position, '.', 2)::bigint;
