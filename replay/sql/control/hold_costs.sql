-- One row per credit hold in $holds that has requests: whether all of them have ended, and their cost.
-- Seconds are counted as a gateway counts them for a hold: overlapping attempts once.
with mine as (
    from requests where allowance in (select unnest($holds))
),
ran as (
    select allowance, mine.model, price_version, attempts.started_at_ns as from_ns, last_event_at_ns as to_ns
    from attempts
    join mine using (request_id)
    where plan = 'per_second' and billed_output_tokens > 0
),
begun as (
    select *, from_ns > coalesce(max(to_ns) over (
        partition by allowance, model, price_version order by from_ns, to_ns
        rows between unbounded preceding and 1 preceding
    ), -1) as is_first
    from ran
),
united as (
    select *, sum(is_first::integer) over (
        partition by allowance, model, price_version order by from_ns, to_ns rows unbounded preceding
    ) as number
    from begun
),
unions as (
    select allowance, model, price_version, (max(to_ns) - min(from_ns) + 999999999) // 1000000000 as seconds
    from united
    group by allowance, model, price_version, number
),
costs as (
    select allowance, seconds * coalesce(second_nanousd, 0) as nanousd
    from unions
    join prices on prices.version = unions.price_version and prices.model = unions.model
    union all
    select allowance, charge_nanousd from mine where plan = 'per_token'
),
spent as (
    select allowance, sum(nanousd) as nanousd from costs group by allowance
)
select
    allowance,
    bool_and(finished_at_ns is not null) as all_ended,
    coalesce(any_value(nanousd), 0)::bigint as nanousd
from mine
left join spent using (allowance)
group by allowance;
