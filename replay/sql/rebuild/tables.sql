-- The events of requests that are neither settled nor left to the fold, kept from window to window. `pos` orders
-- events: sequence * 2^20 + place. `home` is the hash of the address in the record's subject. An event whose
-- request id names another address is left out.
create or replace temp table addresses (home ubigint, prefix varchar, subject varchar);

create or replace temp table records (sequence bigint, home ubigint);

create or replace temp table accepted (
    pos bigint, at_ns bigint, home ubigint, request varchar, account varchar, key varchar, model varchar,
    kind varchar, plan varchar, price_version bigint, stream boolean, book bigint, allowance varchar,
    group_id varchar, choice bigint, client_request_id varchar, traceparent varchar,
    tracestate varchar, admission_ns bigint, json varchar
);

create or replace temp table started (
    pos bigint, at_ns bigint, home ubigint, request varchar, attempt varchar, "after" varchar,
    resume_index bigint, worker varchar, prompt_tokens bigint, engine varchar, model_digest varchar,
    simulated boolean, json varchar
);

create or replace temp table tokens (
    pos bigint, at_ns bigint, home ubigint, attempt varchar, token_index bigint, tokens bigint,
    cached_tokens bigint, sequences bigint[], places integer[], times bigint[], indexes bigint[], json varchar
);

create or replace temp table finished (
    pos bigint, at_ns bigint, home ubigint, request varchar, attempt varchar, reason varchar,
    output_tokens bigint, error_code varchar, account varchar, model varchar, price_version bigint, json varchar
);

-- Releases, cancellations, and ends by control.
create or replace temp table others (
    pos bigint, at_ns bigint, home ubigint, type varchar, request varchar, attempt varchar, why varchar,
    reason varchar, output_tokens bigint, error_code varchar, account varchar, model varchar,
    price_version bigint, json varchar
);

-- Hashes of the ids of requests that the fold holds, and of their attempts.
create or replace temp table known (hash ubigint);
