-- One row per ready replica of a model whose capacity is known.
select replica, hardware, gpus, slots, context_tokens, (ready_at_ns - coalesce(ordered_at_ns, first_seen_at_ns)) // 1000000
from replicas where state = 'ready' and slots is not null and model = $model
