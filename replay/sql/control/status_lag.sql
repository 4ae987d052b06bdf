-- One row per stream: how far the projection is behind, and why it stopped.
select stream, sequence, behind, behind_ns // 1000000 as behind_ms, stopped_why from lag order by stream
