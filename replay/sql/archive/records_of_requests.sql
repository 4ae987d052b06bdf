-- One row per record with an event of `$requests`, or of `$attempts`, which started in an earlier segment.
with own as (
    select unnest($requests::varchar[]) as request
),
attempts as (
    select unnest($attempts::varchar[]) as attempt
    union
    select attempt from read_parquet($events) join own using (request) where attempt is not null
),
own_events as (
    select sequence, sequences from read_parquet($events) join own using (request)
    union all
    select sequence, sequences from read_parquet($events) join attempts using (attempt) where request is null
)
select distinct unnest(coalesce(sequences, [sequence])) as sequence
from own_events
