-- One row per stream; the last folded record, the records behind, and the record that stopped it.
create view lag as
with skipped as (
    select stream, list(distinct sequence order by sequence) as quarantined
    from facts.quarantined_records
    group by stream
)
select
    applied.stream,
    applied.sequence,
    applied.stored_at_ns,
    greatest(coalesce(heads.sequence, 0) - applied.sequence, 0) as behind,
    greatest(coalesce(heads.stored_at_ns, 0) - applied.stored_at_ns, 0) as behind_ns,
    coalesce(skipped.quarantined, []) as quarantined,
    stopped_sequence,
    stopped_why
from facts.applied as applied
left join facts.heads as heads using (stream)
left join skipped using (stream);
