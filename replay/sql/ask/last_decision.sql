-- Show why the latest scaling decision of a model was made, with the numbers that it follows from
-- model (text, required): the model that is scaled
-- limit (number, default 1): how many decisions, newest first
select
    model,
    decided_at_ns,
    from_replicas,
    to_replicas,
    reason,
    policy,
    epoch,
    position,
    inputs
from decisions
where counts and model = $model
order by split_part(split_part(position, ':', 2), '.', 1)::bigint desc, split_part(position, '.', 2)::bigint desc
limit $limit
