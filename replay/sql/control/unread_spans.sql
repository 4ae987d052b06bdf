-- Plan per_second: when attempts of charged requests ran, beside those of the requests in $requests, with their
-- invoice line and their correction. A request ends within minutes, so nothing further away than an hour shares a
-- second with them.
with unread as (
    select account, model, min(accepted_at_ns) as from_ns, max(finished_at_ns) as to_ns
    from facts.ended_requests
    where request_id in (select unnest($requests))
    group by account, model
)
select
    near.account,
    near.model,
    request_id,
    charges.period,
    near.price_version,
    coalesce(prices.second_nanousd, 0) as second_nanousd,
    corrections.nanousd as corrected_nanousd,
    attempts.started_at_ns,
    attempts.last_event_at_ns
from unread
join facts.ended_requests as near
    on near.account = unread.account
    and near.model = unread.model
    and near.accepted_at_ns < unread.to_ns + 3600000000000
    and near.finished_at_ns > unread.from_ns - 3600000000000
join charges using (request_id, plan)
join facts.ended_attempts as attempts using (request_id)
left join facts.published_prices as prices
    on prices.version = near.price_version and prices.model = near.model
left join facts.book_entries as entries on entries.id = 'unanswered.' || request_id
left join facts.corrections as corrections on corrections.position = entries.position
where plan = 'per_second';
