-- One row per plan that counts, in the order of the fleet's position that it was made at.
select model, floor, restart, is_missed, policy, positions, inputs, candidates, restarts, requests, sha256, from_ns,
    planned_at_ns, position
from plans
where counts
order by coalesce((positions ->> '$.RIFT_FLEET')::bigint, 0), split_part(split_part(position, ':', 2), '.', 1)::bigint;
