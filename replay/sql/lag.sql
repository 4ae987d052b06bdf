-- One row per stream; up to where it is folded, and what stopped it.
create view lag as
select
    stream,
    sequence,
    stored_at_ns,
    stopped_sequence,
    stopped_why
from facts.applied;
