-- No rows, unless usage and requests add up to different charges.
select 'usage and requests add up to different charges' as wrong, account as which
from (
    select account, sum(charge_nanousd) as usage_nanousd from usage group by account
) as used
full join (
    select account, sum(charge_nanousd) as requests_nanousd
    from requests where finished_at_ns is not null group by account
) as ended using (account)
where usage_nanousd is distinct from requests_nanousd;
