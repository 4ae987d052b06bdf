-- One row per model with tokens in the last minute: tokens per second, and TTFT of the requests that began to answer.
-- An answer's tokens are taken as evenly distributed over its time.
with recent as (
    select *, epoch_ns(get_current_timestamp()) - 60000000000 as from_ns,
        greatest(last_token_at_ns - first_token_at_ns, 1) as span_ns
    from requests where last_token_at_ns > epoch_ns(get_current_timestamp()) - 60000000000
)
select
    model,
    round(sum(output_tokens * least(1, (last_token_at_ns - from_ns) / span_ns)) / 60, 1)::double as tokens_per_s,
    quantile_disc(first_token_at_ns - accepted_at_ns, 0.5) filter (where first_token_at_ns > from_ns) // 1000000
        as ttft_p50_ms,
    quantile_disc(first_token_at_ns - accepted_at_ns, 0.99) filter (where first_token_at_ns > from_ns) // 1000000
        as ttft_p99_ms
from recent group by model
