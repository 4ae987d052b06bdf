-- One row: the sums of `running` and of its square over a model's reports up to a position of the fleet.
select coalesce(sum(running), 0)::bigint as running_sum, coalesce(sum(running * running), 0)::bigint as running_square_sum
from facts.replica_events
where event = 'reported'
    and model = $model
    and at_ns > $now_ns - $speed_ns
    and split_part(split_part(position, ':', 2), '.', 1)::bigint <= $fleet;
