-- One row per attempt that counted.
create view attempts as
with everything as (
    from facts.ended_attempts
    union all
    from facts.open_attempts
)
select
    attempt_id,
    request_id,
    number,
    model,
    worker,
    engine,
    model_digest,
    simulated,
    outcome,
    resume_index,
    output_tokens,
    cached_tokens,
    started_at_ns,
    first_token_at_ns,
    last_event_at_ns,
    ended_at_ns,
    started_position
from everything;
