-- One row per charged request and per correction.
create view charges as
with charged as (
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
    select *, strftime(make_timestamp(at_ns // 1000), '%Y-%m') as month from charged
),
-- For each closed month and stream: the closed months from that month on without a gap, and the last sequence
-- that belongs to each. A later charge belongs to the month after them.
numbered as (
    select
        closed.period,
        year((closed.period || '-01')::date) * 12 + month((closed.period || '-01')::date) as number,
        applied.stream,
        coalesce(reached.sequence, 0) as sequence
    from facts.closed_periods as closed
    cross join facts.applied as applied
    left join facts.closed_streams as reached
        on reached.period = closed.period and reached.stream = applied.stream
),
following as (
    select first.period as month, first.stream, later.period, later.sequence,
        later.number - first.number - row_number() over (
            partition by first.period, first.stream order by later.number
        ) as gap
    from numbered as first
    join numbered as later on later.stream = first.stream and later.number >= first.number
),
closed as (
    select
        month,
        stream,
        list({'period': period, 'sequence': sequence} order by period) as steps,
        strftime((max(period) || '-01')::date + interval 1 month, '%Y-%m') as after
    from following
    where gap = -1
    group by month, stream
)
select
    dated.account,
    case
        when closed.month is null then dated.month
        else coalesce(
            list_filter(closed.steps, lambda step: dated.sequence <= step.sequence)[1].period, closed.after
        )
    end as period,
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
left join closed on closed.month = dated.month and closed.stream = dated.stream;
