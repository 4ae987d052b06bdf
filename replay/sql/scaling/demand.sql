-- One row: a model's Demand (`replay/scaling/demand.py`) as of positions and a time, one column a field.
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
        request_id,
        cutoffs.sequence as cutoff,
        prompt_tokens,
        output_tokens,
        accepted_at_ns,
        last_token_at_ns - first_token_at_ns as decode_ns,
        finished_at_ns,
        coalesce(finished_sequence <= cutoffs.sequence, false) as has_ended
    from accepted
    join cutoffs on starts_with(accepted_position, cutoffs.stream || ':')
    where model = $model and accepted_at_ns > $since_ns and accepted_sequence <= cutoffs.sequence
),
started as (
    select request_id
    from attempts
    join arrived using (request_id)
    where number = 1
        and not has_ended
        and split_part(split_part(started_position, ':', 2), '.', 1)::bigint <= cutoff
),
dated as (
    select *, request_id in (from started) as has_started from arrived
),
recent as (
    select accepted_at_ns, case when has_ended then finished_at_ns end as ended_at_ns
    from dated
    where not has_ended or finished_at_ns > $now_ns - $pasts * $past_ns
),
pasts as (
    select back, count(accepted_at_ns) as under_way
    from (select unnest(range(1, $pasts::bigint + 1)) as back)
    left join recent
        on accepted_at_ns <= $now_ns - back * $past_ns
        and (ended_at_ns is null or ended_at_ns > $now_ns - back * $past_ns)
    group by back
)
select
    $now_ns::bigint as now_ns,
    count(*) filter (where not has_ended and not has_started) as waiting,
    count(*) filter (where not has_ended and has_started) as running,
    count(*) filter (where accepted_at_ns > $now_ns - $minute_ns) as arrived_minute,
    (select list(under_way order by back) from pasts) as past,
    count(*) filter (where answered) as ended,
    coalesce(sum(prompt_tokens) filter (where answered), 0)::bigint as prompt_tokens,
    coalesce(sum(output_tokens) filter (where answered), 0)::bigint as output_tokens,
    coalesce(sum(decode_ns) filter (where decoded), 0)::bigint as decode_ns,
    coalesce(sum(output_tokens - 1) filter (where decoded), 0)::bigint as decode_tokens,
    coalesce(greatest(max(accepted_at_ns), max(finished_at_ns) filter (where has_ended)), 0) as active_at_ns
from (
    select
        *,
        has_ended and output_tokens > 0 and finished_at_ns > $now_ns - $ended_ns as answered,
        has_ended and output_tokens > 1 and finished_at_ns > $now_ns - $speed_ns as decoded
    from dated
);
