-- One row per stream: how far the projection is behind, the age of its last record, where it stopped, and why.
select stream, sequence, behind, behind_ns // 1000000 as behind_ms,
    greatest(epoch_ns(get_current_timestamp()) - stored_at_ns, 0) // 1000000 as applied_ms, stopped_sequence, stopped_why
from lag
order by stream
