-- The facts: append-only, except for the open_ tables, `applied` and `heads`. There are no keys or indexes:
-- the fold enters each fact once, and the `.check.sql` files verify it.
create schema facts;

-- One row: the version that made this file. Another version refuses it.
create table facts.made_by (version varchar not null);

-- One row per stream: the last folded record, and the record that stopped the fold, if any.
create table facts.applied (
    stream varchar not null,
    sequence bigint not null,
    stored_at_ns bigint not null,
    stopped_sequence bigint,
    stopped_why varchar
);

-- One row per stream that is behind: the end of the stream at the latest query, as the broker reported it.
create table facts.heads (
    stream varchar not null,
    sequence bigint not null,
    stored_at_ns bigint not null
);

-- One row per ended request.
create table facts.ended_requests (
    request_id varchar not null,
    account varchar not null,
    key varchar not null,
    model varchar not null,
    kind varchar not null,
    plan varchar not null,
    price_version bigint not null,
    stream boolean not null,
    group_id varchar,
    choice bigint not null,
    allowance varchar,
    client_request_id varchar,
    traceparent varchar,
    tracestate varchar,
    admission_ns bigint,
    accepted_at_ns bigint not null,
    accepted_sequence bigint not null,
    accepted_position varchar not null,
    state varchar not null,
    finish_reason varchar,
    ended_by varchar,
    cancel_reason varchar,
    error_code varchar,
    simulated boolean not null,
    finish_differs boolean not null,
    prompt_tokens bigint not null,
    cached_tokens bigint not null,
    output_tokens bigint not null,
    attempts bigint not null,
    deaths bigint not null,
    events bigint not null,
    billed_prompt_tokens bigint not null,
    billed_cached_tokens bigint not null,
    billed_output_tokens bigint not null,
    charge_nanousd hugeint not null,
    itl_counts bigint[],
    started_at_ns bigint,
    first_token_at_ns bigint,
    last_token_at_ns bigint,
    finished_at_ns bigint,
    finished_sequence bigint,
    finished_index bigint,
    finished_position varchar
);

-- One row per open request; `life` is its state in the lifecycle, as JSON, so that the fold can continue.
create table facts.open_requests as
select *, '' as life from facts.ended_requests limit 0;

-- One row per attempt that counted and has ended.
create table facts.ended_attempts (
    attempt_id varchar not null,
    request_id varchar not null,
    model varchar not null,
    number bigint not null,
    worker varchar not null,
    engine varchar not null,
    model_digest varchar not null,
    simulated boolean not null,
    resume_index bigint not null,
    started_at_ns bigint not null,
    last_event_at_ns bigint not null,
    started_position varchar not null,
    outcome varchar not null,
    cached_tokens bigint not null,
    output_tokens bigint not null,
    first_token_at_ns bigint,
    ended_at_ns bigint
);

-- One row per live attempt of an open request.
create table facts.open_attempts as
select * from facts.ended_attempts limit 0;

-- One row per event of a replica.
create table facts.replica_events (
    replica varchar not null,
    model varchar not null,
    event varchar not null,
    engine varchar,
    hardware varchar,
    gpus bigint,
    hour_nanousd bigint,
    slots bigint,
    start_ns bigint,
    context_tokens bigint,
    running bigint,
    waiting bigint,
    kv_used_tokens bigint,
    why varchar,
    lived_ns bigint,
    ordered_at_ns bigint,
    position varchar not null,
    at_ns bigint not null
);

-- One row per scaling decision.
create table facts.scale_decisions (
    model varchar not null,
    from_replicas bigint not null,
    to_replicas bigint not null,
    reason varchar not null,
    policy varchar not null,
    positions varchar not null,
    inputs varchar not null,
    epoch bigint not null,
    counts boolean not null,
    decided_at_ns bigint not null,
    plan bigint not null,
    position varchar not null,
    at_ns bigint not null
);

-- One row per plan: the floor under a model's replicas.
create table facts.scale_plans (
    model varchar not null,
    floor bigint not null,
    restart bigint not null,
    is_missed boolean not null,
    policy varchar not null,
    positions varchar not null,
    inputs varchar not null,
    candidates varchar not null,
    restarts varchar not null,
    requests bigint not null,
    sha256 varchar not null,
    from_ns bigint not null,
    planned_at_ns bigint not null,
    epoch bigint not null,
    counts boolean not null,
    position varchar not null,
    at_ns bigint not null
);

-- One row per candidacy of a control process for leader.
create table facts.held_elections (
    epoch bigint not null,
    control varchar not null,
    counts boolean not null,
    position varchar not null,
    at_ns bigint not null
);

-- One row per count of a gateway's report of refused requests.
create table facts.counted_refusals (
    gateway varchar not null,
    shard bigint not null,
    from_at_ns bigint not null,
    to_at_ns bigint not null,
    account varchar,
    reason varchar not null,
    count bigint not null,
    position varchar not null,
    at_ns bigint not null
);

-- One row per event of the book that counts, the first with its id.
create table facts.book_entries (
    id varchar not null,
    event varchar not null,
    position varchar not null,
    at_ns bigint not null
);

create table facts.opened_accounts (
    account varchar not null,
    position varchar not null,
    at_ns bigint not null
);

create table facts.issued_keys (
    key varchar not null,
    account varchar not null,
    scopes varchar[] not null,
    models varchar[],
    expires_at_ns bigint,
    position varchar not null,
    at_ns bigint not null
);

create table facts.revoked_keys (
    key varchar not null,
    account varchar not null,
    position varchar not null,
    at_ns bigint not null
);

-- One row per model and version of the price list; nano-USD a token (or a second).
create table facts.published_prices (
    version bigint not null,
    model varchar not null,
    prompt_nanousd bigint not null,
    output_nanousd bigint not null,
    cached_prompt_nanousd bigint,
    second_nanousd bigint,
    position varchar not null,
    at_ns bigint not null
);

create table facts.set_limits (
    account varchar not null,
    key varchar,
    plan varchar,
    budget_nanousd bigint,
    requests_per_minute bigint,
    tokens_per_minute bigint,
    concurrent bigint,
    queue_share_percent bigint,
    position varchar not null,
    at_ns bigint not null
);

create table facts.granted_credits (
    account varchar not null,
    nanousd bigint not null,
    reason varchar not null,
    position varchar not null,
    at_ns bigint not null
);

create table facts.held_credits (
    id varchar not null,
    account varchar not null,
    shard bigint not null,
    lane varchar not null,
    nanousd bigint not null,
    position varchar not null,
    at_ns bigint not null
);

create table facts.settled_credits (
    account varchar not null,
    hold varchar not null,
    nanousd bigint not null,
    position varchar not null,
    at_ns bigint not null
);

create table facts.corrections (
    account varchar not null,
    model varchar not null,
    request_id varchar,
    nanousd bigint not null,
    reason varchar not null,
    position varchar not null,
    sequence bigint not null,
    event_index bigint not null,
    at_ns bigint not null
);

-- One row per closed period; `positions` and `roots` are JSON objects by stream.
create table facts.closed_periods (
    period varchar not null,
    positions varchar not null,
    roots varchar not null,
    digest varchar not null,
    rules bigint not null,
    position varchar not null,
    at_ns bigint not null
);

-- One row per closed period and stream: the last sequence that belongs to the period.
create table facts.closed_streams (
    period varchar not null,
    stream varchar not null,
    sequence bigint not null
);

-- One row per segment of the archive.
create table facts.sealed_segments (
    stream varchar not null,
    first_sequence bigint not null,
    last_sequence bigint not null,
    manifest varchar not null,
    position varchar not null,
    at_ns bigint not null
);

-- One row per unreadable record that is skipped.
create table facts.quarantined_records (
    stream varchar not null,
    sequence bigint not null,
    reason varchar not null,
    position varchar not null,
    at_ns bigint not null
);
