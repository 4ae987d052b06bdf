-- No rows, unless a request is charged twice or missing on an invoice.
select 'charged twice' as wrong, request_id as which
from charges
where plan <> 'correction'
group by request_id
having count(*) > 1
union all
select 'billed, and on no invoice', requests.request_id
from requests
left join charges on charges.request_id = requests.request_id and charges.plan <> 'correction'
where requests.billed_output_tokens > 0 and charges.request_id is null;
