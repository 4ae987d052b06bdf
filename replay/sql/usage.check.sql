-- No rows, unless usage or unit economics add up to other charges than the invoices.
select 'usage and invoices add up to different charges' as wrong, account as which
from (
    select account, sum(charge_nanousd) as usage_nanousd from usage group by account
) as used
full join (
    select account, sum(nanousd) as billed_nanousd from invoice_lines where plan <> 'correction' group by account
) as billed using (account)
where coalesce(usage_nanousd, 0) <> coalesce(billed_nanousd, 0)
union all
select 'unit economics and invoices add up to different charges', model
from (select model, sum(revenue_nanousd) as revenue_nanousd from unit_economics group by model) as earned
full join (
    select model, sum(nanousd) as billed_nanousd from invoice_lines where plan <> 'correction' group by model
) as billed using (model)
where coalesce(revenue_nanousd, 0) <> coalesce(billed_nanousd, 0);
