-- No rows, unless invoices, requests and prices disagree.
select 'amount is not tokens times price' as wrong, account || ' ' || period || ' ' || lines.model as which
from invoice_lines as lines
left join prices on prices.version = lines.price_version and prices.model = lines.model
where plan = 'per_token'
    and nanousd is distinct from prompt_tokens * prices.prompt_nanousd
        + cached_tokens * coalesce(prices.cached_prompt_nanousd, 0)
        + output_tokens * prices.output_nanousd
union all
select 'per second, without a price for a second', account || ' ' || period || ' ' || lines.model
from invoice_lines as lines
left join prices on prices.version = lines.price_version and prices.model = lines.model
where plan = 'per_second' and prices.second_nanousd is null
union all
select 'invoices and requests add up to different charges', account
from (select account, sum(nanousd) as nanousd from invoice_lines where plan = 'per_token' group by account) as billed
full join (
    select account, sum(charge_nanousd) as charge_nanousd
    from requests where billed_output_tokens > 0 and plan = 'per_token' group by account
) as charged using (account)
where nanousd is distinct from charge_nanousd;
