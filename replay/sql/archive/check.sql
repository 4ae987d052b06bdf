-- One row per record whose hash does not follow from its rows.
with events as (
    select sequence, string_agg(sha256(bare), '' order by place) as hashes, count(*) as events, max(place) as last_place,
        min(at_ns) as at_ns_min, max(at_ns) as at_ns_max
    from exploded($events)
    group by sequence
)
select coalesce(records.sequence, events.sequence) as sequence
from read_parquet($records) records
full join events using (sequence)
where records.hash is distinct from sha256(concat(
        $stream, ' ', sequence, ' ', records.at_ns, ' ', content, ' ', coalesce(hashes, '-'), ' ', subject, ' ', writer
    ))
    or records.events <> coalesce(events.events, 0)
    or coalesce(last_place + 1, 0) <> records.events
    or at_ns_min <> records.at_ns
    or at_ns_max <> records.at_ns
order by sequence
