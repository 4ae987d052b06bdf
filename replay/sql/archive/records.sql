-- One row per record in order, with the columns that the manifest covers.
select
    coalesce(sequence, 0) as sequence,
    coalesce(at_ns, 0) as at_ns,
    coalesce(events, 0) as events,
    case when regexp_full_match(hash, '[0-9a-f]{64}') then hash else '' end as hash
from read_parquet($records)
order by sequence
