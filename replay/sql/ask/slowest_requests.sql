-- Show the ended requests that took longest, and where each spent its time
-- since (time, default 24h): requests accepted since then
-- model (text, optional): only this model
-- account (text, optional): only this account
-- limit (number, default 20): largest number of rows
with slowest as (
    select * from latency
    where accepted_at_ns >= $since
        and e2e_ns is not null
        and model = coalesce($model, model)
        and account = coalesce($account, account)
    order by e2e_ns desc, request_id
    limit $limit
)
select
    request_id,
    account,
    model,
    state,
    accepted_at_ns,
    queue_ns // 1000000 as queue_ms,
    ttft_ns // 1000000 as ttft_ms,
    tpot_ns // 1000000 as tpot_ms,
    e2e_ns // 1000000 as e2e_ms,
    prompt_tokens,
    output_tokens,
    attempts
from slowest
join (select request_id, prompt_tokens, output_tokens, attempts from requests) using (request_id)
order by e2e_ns desc, request_id
