-- One row per scaling decision.
create view decisions as
select
    model,
    from_replicas,
    to_replicas,
    reason,
    policy,
    positions,
    inputs,
    epoch,
    counts,
    decided_at_ns,
    plan,
    at_ns as stored_at_ns,
    position
from facts.scale_decisions;
