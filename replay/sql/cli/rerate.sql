-- One row per account, model and plan: what the period charged, and with which tokens. Another price list may
-- give cached tokens a price of their own, so they are counted even if the old list did not.
select
    charges.account, charges.model, charges.plan,
    sum(charges.prompt_tokens + charges.cached_tokens) as prompt_tokens,
    coalesce(sum(least(requests.cached_tokens, requests.prompt_tokens))
        filter (where charges.prompt_tokens + charges.cached_tokens > 0), 0) as cached_tokens,
    sum(charges.output_tokens) as output_tokens,
    sum(charges.charge_nanousd) as nanousd
from charges
join requests using (request_id)
where charges.period = $period and charges.plan = 'per_token'
group by all
union all
select account, model, plan, seconds, 0, 0, nanousd
from invoice_lines
where period = $period and plan = 'per_second'
order by 1, 2, 3
