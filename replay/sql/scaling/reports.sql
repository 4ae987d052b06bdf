-- One row: the sums of `Replicas` (`replay/scaling/demand.py`) over a model's reports up to a position of the fleet.
select
    coalesce(sum(running), 0)::bigint as running_sum,
    coalesce(
        sum((running::bigint * 1000000000) // ($step_us::bigint + $step_us_per_running::bigint * running)), 0
    )::bigint as tokens_per_ks_sum
from facts.replica_events
where event = 'reported'
    and model = $model
    and at_ns > $now_ns - $speed_ns
    and split_part(split_part(position, ':', 2), '.', 1)::bigint <= $fleet;
