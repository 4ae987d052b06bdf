-- One row per accepted request.
create view requests as
with everything as (
    from facts.ended_requests
    union all
    select * exclude (life) from facts.open_requests
)
select
    request_id,
    account,
    key,
    model,
    kind,
    state,
    finish_reason,
    ended_by,
    cancel_reason,
    error_code,
    prompt_tokens,
    output_tokens,
    cached_tokens,
    attempts,
    deaths,
    events,
    billed_prompt_tokens,
    billed_cached_tokens,
    billed_output_tokens,
    charge_nanousd,
    price_version,
    plan,
    stream,
    simulated,
    group_id,
    choice,
    allowance,
    client_request_id,
    coalesce(traceparent[4:35], sha256(coalesce(group_id, request_id))[:32]) as trace_id,
    admission_ns,
    itl_counts,
    accepted_at_ns,
    started_at_ns,
    first_token_at_ns,
    last_token_at_ns,
    finished_at_ns,
    accepted_position,
    finished_position
from everything;
