-- One row per account, key, model, plan and day (UTC) of ended requests.
create view usage as
select
    account,
    key,
    model,
    plan,
    date '1970-01-01' + (finished_at_ns // 86400000000000)::integer as day,
    count(*) as requests,
    count(*) filter (where billed_output_tokens > 0) as charged_requests,
    sum(prompt_tokens) as prompt_tokens,
    sum(cached_tokens) as cached_tokens,
    sum(output_tokens) as output_tokens,
    sum(coalesce(shares.nanousd, charge_nanousd)) as charge_nanousd
from requests
left join shares using (request_id, account, model)
where finished_at_ns is not null
group by account, key, model, plan, day;
