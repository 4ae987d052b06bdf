-- One page of the requests that ended from `since` on and before `until`, in the order of their ends, each with
-- its attempts. The page begins behind the request `after`, which ended at `since`.
with page as (
    from facts.ended_requests
    where (finished_at_ns > $since or finished_at_ns = $since and request_id > $after)
        and finished_at_ns < $until
        and account = coalesce($account, account)
    order by finished_at_ns, request_id
    limit $limit
),
runs as (
    select
        request_id,
        list(struct_pack(
            number, attempt_id, worker, engine, outcome, resume_index, output_tokens, cached_tokens,
            started_at_ns, first_token_at_ns, last_event_at_ns, ended_at_ns, first_seen_at_ns, ready_at_ns
        ) order by number) as attempts
    from facts.ended_attempts
    left join (select replica as worker, first_seen_at_ns, ready_at_ns from replicas) using (worker)
    where request_id in (select request_id from page)
        -- It follows from the line above, and lets DuckDB skip most of the table.
        and started_at_ns between (select min(accepted_at_ns) from page) and (select max(finished_at_ns) from page)
    group by request_id
)
select
    request_id,
    account,
    model,
    kind,
    plan,
    stream,
    group_id,
    choice,
    client_request_id,
    traceparent,
    tracestate,
    state,
    finish_reason,
    ended_by,
    cancel_reason,
    error_code,
    simulated,
    prompt_tokens,
    cached_tokens,
    output_tokens,
    -- Under plan per_second a request has a share of its invoice line, which other requests may still change.
    case when plan = 'per_token' then charge_nanousd end as charge_nanousd,
    admission_ns,
    accepted_at_ns,
    first_token_at_ns,
    finished_at_ns,
    coalesce(runs.attempts, []) as attempts
from page
left join runs using (request_id)
order by finished_at_ns, request_id
