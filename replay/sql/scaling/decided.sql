-- One row per scaling decision, in the order of the fleet's position that it was decided at.
select model, to_replicas, reason, policy, positions, inputs, decided_at_ns, position
from decisions
order by coalesce((positions ->> '$.RIFT_FLEET')::bigint, 0), split_part(split_part(position, ':', 2), '.', 1)::bigint;
