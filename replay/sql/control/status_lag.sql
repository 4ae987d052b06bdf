-- One row per stream: how far the projection is behind, where it stopped, and why.
select stream, sequence, behind, behind_ns // 1000000 as behind_ms, stopped_sequence, stopped_why
from lag
order by stream
