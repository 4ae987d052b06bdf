-- One row per value of the columns named in `$groups`: an account's usage from one day to another, inclusive.
-- Columns that are not named are null.
with ended as (
    select
        *,
        make_timestamp(finished_at_ns // 3600000000000 * 3600000000) as hour,
        coalesce(shares.nanousd, charge_nanousd) as share_nanousd
    from requests
    left join shares using (request_id, account, model)
    where account = $account and finished_at_ns is not null
)
select
    case when 'hour' in $groups then strftime(hour, '%Y-%m-%dT%H:00:00Z') end as hour,
    case when 'day' in $groups then hour::date end as day,
    case when 'model' in $groups then model end as model,
    case when 'key' in $groups then key end as key,
    case when 'plan' in $groups then plan end as plan,
    count(*) as requests,
    count(*) filter (where billed_output_tokens > 0) as charged_requests,
    sum(prompt_tokens) as prompt_tokens,
    sum(cached_tokens) as cached_tokens,
    sum(output_tokens) as output_tokens,
    sum(share_nanousd) as charge_nanousd
from ended
where hour::date between $first_day::date and $last_day::date
group by all
limit $rows;
