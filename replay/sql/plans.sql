-- One row per change of a model's floor, from a replay of its recent past.
create view plans as
select
    model,
    policy,
    positions,
    inputs,
    epoch,
    floor,
    restart,
    is_missed,
    candidates,
    restarts,
    requests,
    sha256,
    from_ns,
    planned_at_ns,
    counts,
    at_ns as stored_at_ns,
    position
from facts.scale_plans;
