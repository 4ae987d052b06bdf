-- Add the events of some segments.
insert into addresses
select distinct
    hash(prefix),
    prefix,
    concat_ws('.', 'rift', split_part(prefix, '_', 2), 'work', split_part(prefix, '_', 3), split_part(prefix, '_', 4))
from (
    select distinct concat_ws(
        '_', 'req', split_part(subject, '.', 2), split_part(subject, '.', 4), split_part(subject, '.', 5), ''
    ) as prefix
    from read_parquet($records)
    where split_part(subject, '.', 3) in ('request', 'work', 'cancel')
)
where hash(prefix) not in (select home from addresses);

create or replace temp table records as
select
    sequence,
    hash(concat_ws(
        '_', 'req', split_part(subject, '.', 2), split_part(subject, '.', 4), split_part(subject, '.', 5), ''
    )) as home
from read_parquet($records)
where split_part(subject, '.', 3) in ('request', 'work', 'cancel');

insert into accepted
select
    sequence * 1048576 + place, at_ns, home, request, account, key, model, kind, plan, price_version, stream,
    book, allowance, group_id, choice, json ->> '$.client_request_id',
    traceparent, json ->> '$.tracestate', (json ->> '$.admission_ns')::bigint, json
from read_parquet($events)
join records using (sequence)
join addresses using (home)
where
    type = 'RequestAccepted'
    and starts_with(request, prefix)
    and regexp_full_match(substr(request, strlen(prefix) + 1), '\d{1,19}_[a-z2-7]{16}_[a-z2-7]{13}');

insert into started
select
    sequence * 1048576 + place, at_ns, home, request, attempt, "after", resume_index, worker, prompt_tokens,
    engine, model_digest, simulated, json
from read_parquet($events)
join records using (sequence)
join addresses using (home)
where type = 'AttemptStarted' and starts_with(request, prefix);

insert into tokens
select
    sequence * 1048576 + place, at_ns, home, attempt, token_index, tokens, cached_tokens, sequences, places,
    times, indexes, json
from read_parquet($events)
join records using (sequence)
where type = 'TokensGenerated';

insert into finished
select
    sequence * 1048576 + place, at_ns, home, request, attempt, reason, output_tokens, error_code, account, model,
    price_version, json
from read_parquet($events)
join records using (sequence)
join addresses using (home)
where type = 'RequestFinished' and attempt is not null and starts_with(request, prefix);

insert into others
select
    sequence * 1048576 + place, at_ns, home, type, request, attempt, why, reason, output_tokens, error_code,
    account, model, price_version, json
from read_parquet($events)
join records using (sequence)
join addresses using (home)
where
    type in ('AttemptReleased', 'CancelRequested')
    and (request is null or starts_with(request, prefix))
    or type = 'RequestFinished' and attempt is null and starts_with(request, prefix);

delete from known;

insert into known
select hash(unnest($known::varchar[]));

-- An acceptance may be stored again at any time. It is ignored if the request ended in an earlier window.
insert into known
with early as (
    select request, split_part(request, '_', 5)::hugeint as floor from accepted where floor < $first
)
select hash(request_id)
from facts.ended_requests
where request_id in (select request from early) and accepted_sequence > (select min(floor) from early);
