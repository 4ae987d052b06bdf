-- One model's Demand (`replay/demand.py`) as of positions and a time: one row, one column a field.
with cuts as (
    select unnest($streams::varchar[]) as stream, unnest($sequences::bigint[]) as sequence
),
asked as (
    select
        request_id,
        cuts.sequence as cut,
        prompt_tokens,
        output_tokens,
        accepted_at_ns,
        started_at_ns,
        last_token_at_ns - first_token_at_ns as decode_ns,
        finished_at_ns,
        coalesce(split_part(split_part(finished_position, ':', 2), '.', 1)::bigint <= cuts.sequence, false) as has_ended
    from requests
    join cuts on cuts.stream = split_part(accepted_position, ':', 1)
    where model = $model
        and accepted_at_ns > $since_ns
        and split_part(split_part(accepted_position, ':', 2), '.', 1)::bigint <= cuts.sequence
),
begun as (
    select request_id
    from attempts
    join asked using (request_id)
    where number = 1
        and not has_ended
        and split_part(split_part(started_position, ':', 2), '.', 1)::bigint <= cut
),
stood as (
    select *, request_id in (from begun) as has_begun from asked
)
select
    $now_ns::bigint as now_ns,
    count(*) filter (where not has_ended and not has_begun) as waiting,
    count(*) filter (where not has_ended and has_begun) as running,
    count(*) filter (where accepted_at_ns > $now_ns - $burst_ns) as arrived_burst,
    count(*) filter (where accepted_at_ns > $now_ns - $minute_ns) as arrived_minute,
    count(*) filter (where accepted_at_ns > $now_ns - $curve_ns) as arrived_curve,
    count(*) filter (where answered) as ended,
    coalesce(sum(prompt_tokens) filter (where answered), 0)::bigint as prompt_tokens,
    coalesce(sum(output_tokens) filter (where answered), 0)::bigint as output_tokens,
    coalesce(sum(decode_ns) filter (where warm), 0)::bigint as decode_ns,
    coalesce(sum(output_tokens - 1) filter (where warm), 0)::bigint as decode_tokens,
    coalesce(greatest(max(accepted_at_ns), max(finished_at_ns) filter (where has_ended)), 0) as active_at_ns
from (
    select
        *,
        has_ended and output_tokens > 0 and finished_at_ns > $now_ns - $ended_ns as answered,
        has_ended
        and output_tokens > 1
        and finished_at_ns > $now_ns - $speed_ns
        and started_at_ns - accepted_at_ns <= $warm_ns as warm
    from stood
);
