-- One row per charged request and per correction: what an invoice is made of.
create view charges as
with facts_of_money as (
    select
        account,
        model,
        plan,
        price_version,
        request_id,
        billed_prompt_tokens as prompt_tokens,
        billed_cached_tokens as cached_tokens,
        billed_output_tokens as output_tokens,
        charge_nanousd,
        finished_at_ns as at_ns,
        split_part(finished_position, ':', 1) as stream,
        finished_sequence as sequence,
        finished_index as event_index,
        finished_position as position
    from facts.ended_requests
    where billed_output_tokens > 0
    union all
    select
        account, model, 'correction', 0, request_id, 0, 0, 0, nanousd, at_ns,
        split_part(position, ':', 1), sequence, event_index, position
    from facts.corrections
),
dated as (
    select *, strftime(make_timestamp(at_ns // 1000), '%Y-%m') as month from facts_of_money
),
-- What a closed month does not hold any more: it goes to the first later one that is open, or holds it.
late as (
    select dated.position, dated.month, dated.stream, dated.sequence
    from dated
    join facts.closed_periods as closed on closed.period = dated.month
    left join facts.closed_streams as reached
        on reached.period = dated.month and reached.stream = dated.stream
    where dated.sequence > coalesce(reached.sequence, 0)
),
following as (
    select strftime((period || '-01')::date + interval 1 month, '%Y-%m') as period from facts.closed_periods
),
moved as (
    select late.position, min(following.period) as period
    from late
    join following on following.period > late.month
    left join facts.closed_periods as closed on closed.period = following.period
    left join facts.closed_streams as reached
        on reached.period = following.period and reached.stream = late.stream
    where closed.period is null or late.sequence <= coalesce(reached.sequence, 0)
    group by late.position
)
select
    dated.account,
    coalesce(moved.period, dated.month) as period,
    dated.model,
    dated.plan,
    dated.price_version,
    dated.request_id,
    dated.prompt_tokens,
    dated.cached_tokens,
    dated.output_tokens,
    dated.charge_nanousd,
    dated.at_ns,
    dated.stream,
    dated.sequence,
    dated.event_index,
    dated.position
from dated
left join moved on moved.position = dated.position;
