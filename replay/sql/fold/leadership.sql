-- One row per election and scaling decision that counts, in the order of the log; an election has no model.
with counted as (
    select epoch, control, null as model, null as replicas, position from facts.held_elections where counts
    union all
    select epoch, null, model, to_replicas, position from facts.scale_decisions where counts
)
select epoch, control, model, replicas, split_part(split_part(position, ':', 2), '.', 1)::bigint as sequence
from counted
order by sequence, split_part(position, '.', 2)::bigint;
