-- One row per event in order, with the columns of its record; a record without events has one row without an
-- event. If `$sequences` is not null, only of those records.
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
