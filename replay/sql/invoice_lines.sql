-- One row per account, period, model, plan and price version that has a charge.
create view invoice_lines as
with lines as (
    select
        account,
        period,
        model,
        plan,
        price_version,
        count(*) as requests,
        sum(prompt_tokens) as prompt_tokens,
        sum(cached_tokens) as cached_tokens,
        sum(output_tokens) as output_tokens,
        sum(charge_nanousd) as nanousd,
        arg_min(position, (stream, sequence, event_index)) as first_position,
        arg_max(position, (stream, sequence, event_index)) as last_position,
        sha256(string_agg(
            concat_ws(' ', position, prompt_tokens, cached_tokens, output_tokens, charge_nanousd) || chr(10),
            '' order by stream, sequence, event_index
        )) as digest
    from charges
    group by account, period, model, plan, price_version
),
-- Plan per_second: when attempts of charged requests ran. A second is paid once, under the older version,
-- and none before the period began.
ran as (
    select account, period, charges.model, price_version, started_at_ns as from_ns, last_event_at_ns as to_ns
    from charges
    join facts.ended_attempts using (request_id)
    where plan = 'per_second'
),
ended as (
    select account, period, model, price_version, max(to_ns) as to_ns
    from ran
    group by account, period, model, price_version
),
paid as (
    select account, period, model, price_version, max(to_ns) over (
        partition by account, period, model order by price_version
        rows between unbounded preceding and 1 preceding
    ) as until_ns
    from ended
),
clipped as (
    select
        account,
        period,
        model,
        price_version,
        greatest(from_ns, coalesce(until_ns, 0), epoch_ns((period || '-01')::timestamp)) as from_ns,
        to_ns
    from ran
    join paid using (account, period, model, price_version)
),
begun as (
    select *, from_ns > coalesce(max(to_ns) over (
        partition by account, period, model, price_version order by from_ns, to_ns
        rows between unbounded preceding and 1 preceding
    ), -1) as is_first
    from clipped
    where to_ns > from_ns
),
united as (
    select *, sum(is_first::integer) over (
        partition by account, period, model, price_version order by from_ns, to_ns
        rows unbounded preceding
    ) as interval_number
    from begun
),
intervals as (
    select account, period, model, price_version, (max(to_ns) - min(from_ns) + 999999999) // 1000000000 as seconds
    from united
    group by account, period, model, price_version, interval_number
),
running as (
    select account, period, model, price_version, 'per_second' as plan, sum(seconds) as seconds
    from intervals
    group by account, period, model, price_version
)
select
    lines.account,
    lines.period,
    case when closed.period is null then 'open' else 'closed' end as status,
    lines.model,
    lines.plan,
    lines.price_version,
    lines.requests,
    lines.prompt_tokens,
    lines.cached_tokens,
    lines.output_tokens,
    coalesce(running.seconds, 0) as seconds,
    case
        when lines.plan = 'per_second'
            then coalesce(running.seconds, 0) * coalesce(prices.second_nanousd, 0)::hugeint
        else lines.nanousd
    end as nanousd,
    lines.first_position,
    lines.last_position,
    lines.digest
from lines
left join running using (account, period, model, plan, price_version)
left join facts.published_prices as prices
    on prices.version = lines.price_version and prices.model = lines.model
left join facts.closed_periods as closed on closed.period = lines.period;
