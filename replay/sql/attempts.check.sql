-- No rows, unless a request and its attempts disagree.
with counted as (
    select request_id, count(*) as attempts, sum(output_tokens) as output_tokens, max(number) as last_number
    from attempts
    group by request_id
)
select 'attempts and request disagree' as wrong, requests.request_id as which
from requests
left join counted on counted.request_id = requests.request_id
where requests.attempts <> coalesce(counted.attempts, 0)
    or requests.attempts <> coalesce(counted.last_number, 0)
    or requests.output_tokens <> coalesce(counted.output_tokens, 0)
union all
select 'attempt entered twice', attempt_id from attempts group by request_id, attempt_id having count(*) > 1
union all
select 'running attempt of a request that is not running', attempts.attempt_id
from attempts
left join requests on requests.request_id = attempts.request_id
where attempts.outcome = 'running' and requests.state is distinct from 'running';
