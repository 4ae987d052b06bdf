-- No rows, unless the shares do not add up to their invoice line, or one is more than its own seconds cost.
select 'shares and invoice line add up to different charges' as wrong, account || ' ' || period || ' ' || model as which
from (select * from invoice_lines where plan = 'per_second') as lines
full join (
    select account, period, model, price_version, sum(nanousd) as shares_nanousd, count(*) as shares
    from shares group by account, period, model, price_version
) as divided using (account, period, model, price_version)
where nanousd is distinct from shares_nanousd or requests is distinct from shares
union all
select 'a share is negative, or more than its own seconds cost', request_id
from shares
join prices on prices.version = shares.price_version and prices.model = shares.model
left join periods using (period)
where nanousd < 0 or coalesce(rules, 2) >= 2 and nanousd > seconds * coalesce(prices.second_nanousd, 0);
