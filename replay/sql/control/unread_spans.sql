-- Plan per_second: when attempts of charged requests ran, beside those of the requests in $requests. A request
-- ends within minutes, so nothing further away than an hour shares a second with them.
with unread as (
    select account, model, price_version, min(accepted_at_ns) as from_ns, max(finished_at_ns) as to_ns
    from facts.ended_requests
    where request_id in (select unnest($requests))
    group by account, model, price_version
)
select near.account, near.model, near.price_version, request_id, attempts.started_at_ns, last_event_at_ns
from unread
join facts.ended_requests as near
    on near.account = unread.account
    and near.model = unread.model
    and near.price_version = unread.price_version
    and near.accepted_at_ns < unread.to_ns + 3600000000000
    and near.finished_at_ns > unread.from_ns - 3600000000000
join facts.ended_attempts as attempts using (request_id)
anti join facts.book_entries as corrected on corrected.id = 'unanswered.' || request_id
where plan = 'per_second' and billed_output_tokens > 0;
