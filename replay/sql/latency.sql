-- One row per accepted request; an interval that has not ended is null.
create view latency as
select
    request_id,
    model,
    state,
    started_at_ns - accepted_at_ns as queue_ns,
    first_token_at_ns - accepted_at_ns as ttft_ns,
    case
        when output_tokens > 1 then (last_token_at_ns - first_token_at_ns) // (output_tokens - 1)
    end as tpot_ns,
    itl_counts,
    finished_at_ns - accepted_at_ns as e2e_ns,
    account,
    accepted_at_ns
from requests;
