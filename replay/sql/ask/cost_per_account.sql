-- Show the charges by account and model, without corrections, the largest first
-- since (time, default 30d): requests that ended since then
-- account (text, optional): only this account
select
    account,
    model,
    count(*) as requests,
    count(*) filter (where billed_output_tokens > 0) as charged_requests,
    sum(prompt_tokens) as prompt_tokens,
    sum(cached_tokens) as cached_tokens,
    sum(output_tokens) as output_tokens,
    sum(coalesce(shares.nanousd, charge_nanousd)) as charge_nanousd
from requests
left join shares using (request_id, account, model)
where finished_at_ns >= $since and account = coalesce($account, account)
group by account, model
order by charge_nanousd desc, account, model
