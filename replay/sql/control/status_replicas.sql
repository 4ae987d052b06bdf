-- One row per live replica; `running` is as old as its last report.
select replica, model, state, engine, hardware, slots, running,
    greatest(epoch_ns(get_current_timestamp()) - last_seen_at_ns, 0) // 1000000 as silent_ms
from replicas
where ended_at_ns is null order by model, first_seen_at_ns
