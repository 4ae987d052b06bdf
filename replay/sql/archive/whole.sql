-- One row per event in order, with what its record says; a record without events has one row without an event.
-- Only of some records, if they are named.
with chosen as (
    from read_parquet($records) where $sequences is null or sequence in (select unnest($sequences::bigint[]))
)
select
    chosen.sequence,
    chosen.at_ns,
    chosen.subject,
    chosen.writer,
    chosen.content,
    events.bare
from chosen
left join exploded($events) events using (sequence)
order by chosen.sequence, events.place
