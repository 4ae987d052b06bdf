-- One row per live replica.
select replica, model, state, engine, hardware, slots, running from replicas
where ended_at_ns is null order by model, first_seen_at_ns
