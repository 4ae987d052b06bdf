-- One row per charged request of plan per_second: its share of its invoice line, in proportion to its own seconds.
-- What rounding down leaves goes to the largest remainders, a nano-USD each, in the order of the log.
create view shares as
with own as (
    select
        account,
        period,
        model,
        plan,
        price_version,
        request_id,
        stream,
        sequence,
        event_index,
        coalesce(sum((last_event_at_ns - started_at_ns + 999999999) // 1000000000), 0) as seconds
    from charges
    left join facts.ended_attempts using (request_id, model)
    where plan = 'per_second'
    group by all
),
divided as (
    select
        own.*,
        lines.nanousd as line_nanousd,
        greatest(sum(own.seconds) over line, 1) as line_seconds,
        lines.nanousd * own.seconds // line_seconds as whole_nanousd,
        lines.nanousd * own.seconds % line_seconds as remainder
    from own
    join invoice_lines as lines using (account, period, model, plan, price_version)
    window line as (partition by account, period, model, price_version)
),
ranked as (
    select
        *,
        line_nanousd - sum(whole_nanousd) over line as left_nanousd,
        row_number() over (line order by remainder desc, stream, sequence, event_index) as rank
    from divided
    window line as (partition by account, period, model, price_version)
)
select
    account,
    period,
    model,
    price_version,
    request_id,
    seconds,
    whole_nanousd + (rank <= left_nanousd)::integer as nanousd
from ranked;
