-- One row per value of the columns named in `$groups`: an account's usage from one day to another, inclusive.
-- Columns that are not named are null.
select
    case when 'day' in $groups then day end as day,
    case when 'model' in $groups then model end as model,
    case when 'key' in $groups then key end as key,
    case when 'plan' in $groups then plan end as plan,
    sum(requests) as requests,
    sum(charged_requests) as charged_requests,
    sum(prompt_tokens) as prompt_tokens,
    sum(cached_tokens) as cached_tokens,
    sum(output_tokens) as output_tokens,
    sum(charge_nanousd) as charge_nanousd
from usage
where account = $account and day between $first_day::date and $last_day::date
group by all;
