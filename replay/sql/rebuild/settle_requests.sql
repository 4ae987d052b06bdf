-- Requests that have other events than one acceptance, one start and one end, and attempts that have others than
-- one start and one end. They are told apart by hash: if two ids collide, the fold gets both.
create or replace temp table odd_requests as
select hash, count(*) as rows, bit_or(flag) as flags
from (
    select hash(request) as hash, 1 as flag from accepted
    union all
    select hash(request), 2 from started
    union all
    select hash(request), 4 from finished
    union all
    select hash(request), 8 from others where request is not null
    union all
    select hash, 8 from known
)
group by hash
having count(*) <> 3 or bit_or(flag) <> 7;

create or replace temp table odd_attempts as
select hash, sum(one) as rows, bit_or(flag) as flags
from (
    select hash(attempt) as hash, 1 as one, 1 as flag from started
    union all
    select hash(attempt), 1, 2 from finished
    union all
    select hash(attempt), 1, 4 from others where type = 'AttemptReleased'
    union all
    select hash(attempt), 0, 8 from tokens
    union all
    select hash, 1, 4 from known
)
group by hash
having sum(one) <> 2 or bit_or(flag) & 7 <> 3;

-- One row per attempt, with all its tokens. An attempt that crosses segments has several runs.
create or replace temp table answers as
with several as (
    select hash(attempt) as hash from tokens group by all having count(*) > 1
),
ordered as (
    select *, sum(tokens) over (partition by attempt order by pos) - tokens as expected
    from tokens
    where hash(attempt) in (from several)
)
select
    attempt,
    home,
    token_index as first_index,
    tokens,
    coalesce(cached_tokens, 0) as cached_tokens,
    pos as first_pos,
    coalesce(sequences[-1] * 1048576 + places[-1], pos) as last_pos,
    at_ns as first_at_ns,
    coalesce(times[-1], at_ns) as last_at_ns,
    times
from tokens
where hash(attempt) not in (from several)
union all
select
    attempt,
    any_value(home),
    -- Not 0 if anything is out of place, so that the fold gets it.
    max(case when token_index = expected and home = first_home then 0 else 1 end),
    sum(tokens)::bigint,
    coalesce(first(cached_tokens order by pos), 0),
    min(pos),
    max(coalesce(sequences[-1] * 1048576 + places[-1], pos)),
    min(at_ns),
    max(coalesce(times[-1], at_ns)),
    flatten(list(coalesce(times, [at_ns]) order by pos))
from (select *, first_value(home) over (partition by attempt order by pos) as first_home from ordered)
group by attempt;

-- One row per common request, with everything for its two rows.
create or replace temp table common as
select
    accepted.pos as accepted_pos,
    accepted.at_ns as accepted_at_ns,
    accepted.* exclude (pos, at_ns, home, book, json),
    started.pos as started_pos,
    started.at_ns as started_at_ns,
    started.attempt,
    started.worker,
    started.prompt_tokens,
    started.engine,
    started.model_digest,
    coalesce(started.simulated, false) as simulated,
    coalesce(answers.tokens, 0) as output_tokens,
    coalesce(answers.cached_tokens, 0) as cached_tokens,
    answers.first_at_ns,
    answers.last_at_ns,
    case when answers.tokens is null then 0 else coalesce(len(answers.times), 1) end as token_events,
    answers.times,
    finished.pos as finished_pos,
    finished.at_ns as finished_at_ns,
    finished.reason,
    finished.error_code,
    coalesce(finished.account <> accepted.account, false)
        or coalesce(finished.model <> accepted.model, false)
        or coalesce(finished.price_version <> accepted.price_version, false) as finish_differs,
    finished.reason in $chargeable and coalesce(answers.tokens, 0) > 0 as is_charged,
    prices.prompt_nanousd,
    prices.output_nanousd,
    prices.cached_prompt_nanousd
from accepted
join started using (request)
join finished on finished.attempt = started.attempt and finished.request = started.request
left join answers on answers.attempt = started.attempt
join facts.published_prices prices
    on prices.version = accepted.price_version and prices.model = accepted.model
where
    hash(accepted.request) not in (select hash from odd_requests)
    and hash(started.attempt) not in (select hash from odd_attempts)
    and started."after" is null
    and started.resume_index = 0
    and accepted.group_id is null
    and coalesce(accepted.book, 0) <= $book
    and finished.output_tokens = coalesce(answers.tokens, 0)
    and coalesce(answers.first_index, 0) = 0
    and coalesce(answers.home, accepted.home) = accepted.home
    and accepted.pos < started.pos
    and started.pos < coalesce(answers.first_pos, finished.pos)
    and coalesce(answers.last_pos, started.pos) < finished.pos;

insert into facts.ended_requests by name
with billed as (
    select
        *,
        list_transform(times[2:], lambda at_ns, place: itl_bucket(at_ns - times[place])) as buckets,
        case when is_charged and cached_prompt_nanousd is not null then least(cached_tokens, prompt_tokens) else 0 end
            as billed_cached_tokens,
        case when is_charged then prompt_tokens - billed_cached_tokens else 0 end as billed_prompt_tokens,
        case when is_charged then output_tokens else 0 end as billed_output_tokens
    from common
)
select
    request as request_id,
    account,
    key,
    model,
    kind,
    coalesce(plan, 'per_token') as plan,
    price_version,
    stream,
    group_id,
    coalesce(choice, 0) as choice,
    allowance,
    client_request_id,
    traceparent,
    tracestate,
    admission_ns,
    accepted_at_ns,
    accepted_pos >> 20 as accepted_sequence,
    concat($stream, ':', accepted_pos >> 20, '.', accepted_pos & 1048575) as accepted_position,
    case
        when reason in ('stop', 'length', 'tool_calls') then 'finished'
        when reason in ('cancelled', 'revoked') then 'cancelled'
        else reason
    end as state,
    reason as finish_reason,
    'worker' as ended_by,
    error_code,
    simulated,
    finish_differs,
    prompt_tokens,
    cached_tokens,
    output_tokens,
    1 as attempts,
    0 as deaths,
    3 + token_events as events,
    billed_prompt_tokens,
    billed_cached_tokens,
    billed_output_tokens,
    case when coalesce(plan, 'per_token') = 'per_token' then
        billed_prompt_tokens::hugeint * prompt_nanousd
        + billed_cached_tokens::hugeint * coalesce(cached_prompt_nanousd, 0)
        + billed_output_tokens::hugeint * output_nanousd
    else 0 end as charge_nanousd,
    case when token_events > 1 then itl_counts(buckets) end as itl_counts,
    started_at_ns,
    first_at_ns as first_token_at_ns,
    last_at_ns as last_token_at_ns,
    finished_at_ns,
    finished_pos >> 20 as finished_sequence,
    finished_pos & 1048575 as finished_index,
    concat($stream, ':', finished_pos >> 20, '.', finished_pos & 1048575) as finished_position
from billed;

insert into facts.ended_attempts by name
select
    attempt as attempt_id,
    request as request_id,
    model,
    1 as number,
    worker,
    engine,
    model_digest,
    simulated,
    0 as resume_index,
    started_at_ns,
    finished_at_ns as last_event_at_ns,
    concat($stream, ':', started_pos >> 20, '.', started_pos & 1048575) as started_position,
    'finished' as outcome,
    cached_tokens,
    output_tokens,
    first_at_ns as first_token_at_ns,
    finished_at_ns as ended_at_ns
from common;
