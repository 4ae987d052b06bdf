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
-- Plan per_second: when attempts of charged requests ran. A line is not charged for time that an earlier line
-- (by period, then version) of the same account and model has paid for. Since version 2 of the rules it is not
-- charged for more than it would be without earlier lines: the pieces that they leave are rounded up, each.
ran as (
    select account, model, period, price_version, started_at_ns as from_ns, last_event_at_ns as to_ns
    from charges
    join facts.ended_attempts using (request_id, model)
    where plan = 'per_second'
),
spans as (
    select account, model, period, price_version, min(from_ns) as from_ns, max(to_ns) as to_ns
    from ran
    group by account, model, period, price_version
),
intervals as (
    select account, model, period, price_version, is_cut, from_ns, to_ns, 1 as own, 0 as older
    from ran, (values (true), (false)) as kinds(is_cut)
    union all
    select spans.account, spans.model, spans.period, spans.price_version, true, ran.from_ns, ran.to_ns, 0, 1
    from spans
    join ran
        on ran.account = spans.account and ran.model = spans.model
        and (ran.period < spans.period
            or ran.period = spans.period and ran.price_version < spans.price_version)
        and ran.from_ns < spans.to_ns and ran.to_ns > spans.from_ns
),
steps as (
    select account, model, period, price_version, is_cut, from_ns as at_ns, own, older from intervals
    union all
    select account, model, period, price_version, is_cut, to_ns, -own, -older from intervals
),
instants as (
    select account, model, period, price_version, is_cut, at_ns, sum(own) as own, sum(older) as older
    from steps
    group by account, model, period, price_version, is_cut, at_ns
),
running as (
    select
        account, model, period, price_version, is_cut, at_ns,
        sum(own) over line > 0 and sum(older) over line = 0 as is_paid
    from instants
    window line as (partition by account, model, period, price_version, is_cut order by at_ns)
),
changing as (
    select *, is_paid <> lag(is_paid, 1, false) over line as is_change
    from running
    window line as (partition by account, model, period, price_version, is_cut order by at_ns)
),
unions as (
    select
        account, model, period, price_version, is_cut, is_paid,
        (lead(at_ns) over line - at_ns + 999999999) // 1000000000 as seconds
    from changing
    where is_change
    window line as (partition by account, model, period, price_version, is_cut order by at_ns)
),
paid as (
    select
        account, model, period, price_version, 'per_second' as plan,
        least(
            coalesce(sum(seconds) filter (where is_cut), 0),
            sum(seconds) filter (where not is_cut and coalesce(closed.rules, 2) >= 2)
        ) as seconds
    from unions
    left join facts.closed_periods as closed using (period)
    where is_paid
    group by account, model, period, price_version
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
    coalesce(paid.seconds, 0) as seconds,
    case
        when lines.plan = 'per_second'
            then coalesce(paid.seconds, 0) * coalesce(prices.second_nanousd, 0)::hugeint
        else lines.nanousd
    end as nanousd,
    lines.first_position,
    lines.last_position,
    lines.digest
from lines
left join paid using (account, period, model, plan, price_version)
left join facts.published_prices as prices
    on prices.version = lines.price_version and prices.model = lines.model
left join facts.closed_periods as closed on closed.period = lines.period;
