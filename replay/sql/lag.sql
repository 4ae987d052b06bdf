-- One row per stream; up to where it is folded, what is not, and what stopped it.
create view lag as
select
    applied.stream,
    applied.sequence,
    applied.stored_at_ns,
    greatest(coalesce(heads.sequence, 0) - applied.sequence, 0) as behind,
    greatest(coalesce(heads.stored_at_ns, 0) - applied.stored_at_ns, 0) as behind_ns,
    stopped_sequence,
    stopped_why
from facts.applied as applied
left join facts.heads as heads using (stream);
