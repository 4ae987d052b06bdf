-- One row per sealed segment of the archive.
create view segments as
select
    stream,
    first_sequence,
    last_sequence,
    manifest,
    at_ns as sealed_at_ns,
    position
from facts.sealed_segments;
