-- One row per model and second in which a request arrived, started or ended.
create view demand as
with moments as (
    select model, accepted_at_ns as at_ns, 1 as arrivals, 0 as starts, 0 as ends, prompt_tokens, 0 as output_tokens
    from requests
    union all
    select model, started_at_ns, 0, 1, 0, 0, 0 from requests where started_at_ns is not null
    union all
    select model, finished_at_ns, 0, 0, 1, 0, output_tokens from requests where finished_at_ns is not null
)
select
    model,
    at_ns // 1000000000 as second,
    sum(arrivals) as arrivals,
    sum(starts) as starts,
    sum(ends) as ends,
    sum(prompt_tokens) as prompt_tokens,
    sum(output_tokens) as output_tokens
from moments
group by model, second;
