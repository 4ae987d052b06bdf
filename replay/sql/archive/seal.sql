-- One row per event, except that consecutive token events of one attempt are one row, a run. `json` is null if
-- the columns are enough to make it.
with typed as (
    select sequence, place, at_ns, subject, bare, unnest(json_transform(bare, '{
        "type": "VARCHAR", "request": "VARCHAR", "attempt": "VARCHAR",
        "account": "VARCHAR", "key": "VARCHAR", "model": "VARCHAR", "kind": "VARCHAR", "parameters": "JSON",
        "stream": "BOOLEAN", "prompt_tokens_max": "BIGINT", "deadline_ms": "BIGINT", "price_version": "BIGINT",
        "plan": "VARCHAR", "book": "BIGINT", "allowance": "VARCHAR", "group": "VARCHAR", "choice": "BIGINT",
        "idempotency_hash": "VARCHAR", "rules": "BIGINT", "detached": "BOOLEAN", "traceparent": "VARCHAR",
        "after": "VARCHAR", "resume_index": "BIGINT", "worker": "VARCHAR", "prompt_tokens": "BIGINT",
        "accepted_at_ns": "BIGINT", "engine": "VARCHAR", "model_digest": "VARCHAR", "delivery": "VARCHAR",
        "simulated": "BOOLEAN", "index": "BIGINT", "tokens": "BIGINT", "cached_tokens": "BIGINT",
        "reason": "VARCHAR", "output_tokens": "BIGINT", "why": "VARCHAR",
        "error": {"code": "VARCHAR", "param": "VARCHAR"},
        "stamps": {"engine_ns": "BIGINT", "first_token_ns": "BIGINT", "finished_ns": "BIGINT"}
    }'))
    from sealed_events
),
named as (
    select
        * exclude (bare, "group", "index", error, stamps, parameters),
        bare,
        parameters::varchar as parameters,
        "group" as group_id,
        "index" as token_index,
        error.code as error_code,
        error.param as error_param,
        stamps.engine_ns as engine_ns,
        stamps.first_token_ns as first_token_ns,
        stamps.finished_ns as finished_ns
    from typed
),
encoded as (
    select * exclude (bare), case when bare is distinct from bare_json then bare end as json
    from named
),
-- A gap, an event with cached tokens, or another subject starts a new run.
marked as (
    select
        *,
        type = 'TokensGenerated' and json is null as can_run,
        token_index is distinct from lag(token_index + tokens) over preceding_tokens or cached_tokens is not null as is_first
    from encoded
    window preceding_tokens as (
        partition by attempt, subject, type = 'TokensGenerated' and json is null order by sequence, place
    )
),
numbered as (
    select
        *,
        sum(is_first::integer) over (partition by attempt, subject, can_run order by sequence, place) as run
    from marked
    where can_run
),
runs as (
    select
        attempt,
        subject,
        max(cached_tokens) as cached_tokens,
        min(token_index) as token_index,
        sum(tokens)::bigint as tokens,
        list(sequence order by sequence, place) as sequences,
        list(place order by sequence, place) as places,
        list(at_ns order by sequence, place) as times,
        list(token_index order by sequence, place) as indexes
    from numbered
    group by attempt, subject, run
)
select
    sequence, place, at_ns, type, request, attempt,
    account, key, model, kind, parameters, stream, prompt_tokens_max, deadline_ms, price_version, plan, book,
    allowance, group_id, choice, idempotency_hash, rules, detached, traceparent,
    "after", resume_index, worker, prompt_tokens, accepted_at_ns, engine, model_digest, delivery, simulated,
    reason, output_tokens, error_code, error_param, engine_ns, first_token_ns, finished_ns, why,
    token_index, tokens, cached_tokens,
    null::bigint[] as sequences, null::integer[] as places, null::bigint[] as times, null::bigint[] as indexes,
    json
from marked
where not can_run
union all by name
select
    sequences[1] as sequence,
    places[1] as place,
    times[1] as at_ns,
    'TokensGenerated' as type,
    attempt,
    token_index,
    tokens,
    cached_tokens,
    case when len(sequences) > 1 then sequences end as sequences,
    case when len(sequences) > 1 then places end as places,
    case when len(sequences) > 1 then times end as times,
    case when len(sequences) > 1 then indexes end as indexes
from runs
order by type, sequence, place
