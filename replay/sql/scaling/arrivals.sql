-- One row per slot with requests of a model (`replay/scaling/arrivals.py`), as of positions and a time. `oldest` is the
-- first slot of the last day in each row.
with cutoffs as (
    select unnest($streams::varchar[]) as stream, unnest($sequences::bigint[]) as sequence
),
accepted as (
    select * from facts.ended_requests
    union all
    select * exclude (life) from facts.open_requests
),
arrived as (
    select
        accepted_at_ns // $slot_ns as slot,
        prompt_tokens,
        output_tokens,
        output_tokens > 0 and coalesce(finished_sequence <= cutoffs.sequence, false) as answered
    from accepted
    join cutoffs on starts_with(accepted_position, cutoffs.stream || ':')
    where model = $model and accepted_at_ns > $day_ns and accepted_sequence <= cutoffs.sequence
),
slots as (
    select
        slot,
        count(*) as requests,
        count(*) filter (where answered) as ended,
        coalesce(sum(prompt_tokens) filter (where answered), 0)::bigint as prompt_tokens,
        coalesce(sum(output_tokens) filter (where answered), 0)::bigint as output_tokens,
        coalesce(sum(output_tokens * output_tokens) filter (where answered), 0)::bigint as output_squares,
        count(*) filter (where answered and prompt_tokens > $long_tokens) as long
    from arrived
    group by slot
),
ranked as (
    select
        *,
        min(slot) over () as oldest,
        coalesce(sum(requests) over (order by slot desc rows between unbounded preceding and 1 preceding), 0) as later
    from slots
)
select slot, requests, ended, prompt_tokens, output_tokens, output_squares, long, oldest
from ranked
where slot > $since or later < case when slot > $since_long then $requests_long else $requests_min end
order by slot;
