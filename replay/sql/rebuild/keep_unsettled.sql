-- Remove settled events, keep those that the next window may complete, and leave the rest to the fold.
create or replace temp table uncommon_requests as
select hash from odd_requests
union
select hash(request) from accepted where pos not in (select accepted_pos from common);

create or replace temp table uncommon_attempts as
select hash from odd_attempts
union
select hash(attempt) from started where hash(request) in (from uncommon_requests);

create or replace temp table waiting_requests as
select hash(accepted.request) as hash
from accepted
join odd_requests requests on requests.hash = hash(accepted.request)
left join started using (request)
left join odd_attempts attempts on attempts.hash = hash(started.attempt)
where
    not $is_last
    and (
        requests.rows = 1 and requests.flags = 1
        or requests.rows = 2 and requests.flags = 3 and attempts.rows = 1 and attempts.flags & 7 = 1
    );

create or replace temp table waiting_attempts as
select hash(attempt) as hash from started where hash(request) in (from waiting_requests);

-- One row per event for the fold: those of requests, and reports of refused requests. Fields that the fold does not read (deliveries, parameters) are empty.
create or replace temp table rest as
with left_tokens as (
    select * from tokens
    where hash(attempt) in (from uncommon_attempts) and hash(attempt) not in (from waiting_attempts)
),
events as (
    select 'RequestAccepted' as type, * exclude (pos, at_ns, home), pos, at_ns, home
    from accepted
    where hash(request) in (from uncommon_requests) and hash(request) not in (from waiting_requests)
    union all by name
    select 'AttemptStarted' as type, *
    from started
    where hash(request) in (from uncommon_requests) and hash(request) not in (from waiting_requests)
    union all by name
    select 'TokensGenerated' as type, * exclude (sequences, places, times, indexes)
    from left_tokens
    where sequences is null
    union all by name
    select
        'TokensGenerated' as type,
        sequence * 1048576 + place as pos,
        at_ns,
        home,
        attempt,
        token_index,
        next_index - token_index as tokens,
        case when token_index = first_index then cached_tokens end as cached_tokens
    from (
        select
            home,
            attempt,
            cached_tokens,
            token_index as first_index,
            unnest(sequences) as sequence,
            unnest(places) as place,
            unnest(times) as at_ns,
            unnest(indexes) as token_index,
            unnest(list_append(indexes[2:], token_index + tokens)) as next_index
        from left_tokens
        where sequences is not null
    )
    union all by name
    select 'RequestFinished' as type, *
    from finished
    where hash(request) in (from uncommon_requests) and hash(request) not in (from waiting_requests)
    union all by name
    select * from others
),
filled as (
    select
        *,
        '{}' as parameters,
        0 as prompt_tokens_max,
        0 as deadline_ms,
        null as idempotency_hash,
        null as rules,
        null as detached,
        0 as accepted_at_ns,
        '' as delivery,
        null as error_param,
        null as engine_ns,
        null as first_token_ns,
        null as finished_ns
    from events
)
select
    pos,
    pos // 1048576 as sequence,
    at_ns,
    addresses.subject,
    pos % 1048576 as place,
    coalesce(json, bare_json) as bare
from filled
join addresses using (home)
union all
select sequence * 1048576 + place, sequence, events.at_ns, subject, place, json
from read_parquet($events) events
join read_parquet($records) using (sequence)
where type = 'RequestsRefused'
order by pos;

create or replace temp table accepted as
select * from accepted where hash(request) in (from waiting_requests);

create or replace temp table started as
select * from started where hash(request) in (from waiting_requests);

create or replace temp table tokens as
select * from tokens where hash(attempt) in (from waiting_attempts);

delete from finished;

delete from others;
