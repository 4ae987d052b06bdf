-- Show the requests that a lost replica interrupted, with their accounts and how each went on
-- since (time, default 24h): replicas lost since then
-- replica (text, optional): only this replica
-- account (text, optional): only this account
select
    replica,
    replicas.ended_at_ns as lost_at_ns,
    replicas.why,
    requests.account,
    request_id,
    hit.number as attempt,
    hit.outcome,
    hit.resume_index + hit.output_tokens as tokens_before,
    again.worker as continued_by,
    (again.first_token_at_ns - hit.last_event_at_ns) // 1000000 as interrupted_ms,
    requests.state
from replicas
join attempts as hit on hit.worker = replicas.replica
join requests using (request_id)
left join attempts as again on again.request_id = hit.request_id and again.number = hit.number + 1
where replicas.state = 'lost'
    and replicas.ended_at_ns >= $since
    and replica = coalesce($replica, replica)
    and requests.account = coalesce($account, requests.account)
    and hit.outcome not in ('finished', 'draining')
    -- A request that control or a cancellation ended before the loss was not interrupted by it.
    and (hit.outcome <> 'ended' or hit.ended_at_ns >= replicas.ended_at_ns)
order by lost_at_ns desc, replica, requests.account, request_id, attempt
