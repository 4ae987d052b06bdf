-- One row per request of an account, newest first; only those older than request `$after` if it is not null.
-- `seconds` are those of relation `shares`, also of a request that is not charged.
with page as (
    select *
    from requests
    where account = $account
        and ($after::varchar is null or (accepted_at_ns, request_id) < (
            select (accepted_at_ns, request_id) from requests where account = $account and request_id = $after
        ))
    order by accepted_at_ns desc, request_id desc
    limit $limit
),
ran as (
    select request_id, sum((last_event_at_ns - started_at_ns + 999999999) // 1000000000) as seconds
    from facts.ended_attempts
    where request_id in (select request_id from page where plan = 'per_second')
    group by request_id
)
select
    request_id,
    page.model,
    kind,
    state,
    finish_reason,
    prompt_tokens,
    output_tokens,
    charge_nanousd,
    plan,
    group_id,
    choice,
    accepted_at_ns,
    finished_at_ns,
    coalesce(ran.seconds, 0) as seconds,
    case when billed_output_tokens > 0 then coalesce(ran.seconds, 0) * prices.second_nanousd::hugeint else 0 end
        as at_most_nanousd
from page
left join ran using (request_id)
left join facts.published_prices as prices
    on prices.version = page.price_version and prices.model = page.model
order by accepted_at_ns desc, request_id desc;
