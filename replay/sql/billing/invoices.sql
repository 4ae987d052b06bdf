-- One row per month with a charge of an account, newest first; only those older than `$after` if it is not null.
select period, status, sum(nanousd) as total_nanousd
from invoice_lines
where account = $account and ($after::varchar is null or period < $after)
group by period, status
order by period desc
limit $limit;
