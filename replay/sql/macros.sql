-- Macros over the relations. They compute with integers, as the relations do.

-- Aggregate: the gap that a share of the gaps in histograms `itl_counts` stays below, as the upper bound of its
-- bucket in nanoseconds. In the last bucket, which has no upper bound, it is the lower one; null without a gap.
create macro itl_percentile_ns(counts, share) as (
    select list(coalesce(below_ns, from_ns) order by bucket) from itl_bounds
)[list_transform(
    [[
        sum(counts[1]), sum(counts[2]), sum(counts[3]), sum(counts[4]), sum(counts[5]), sum(counts[6]),
        sum(counts[7]), sum(counts[8]), sum(counts[9]), sum(counts[10]), sum(counts[11]), sum(counts[12]),
        sum(counts[13]), sum(counts[14]), sum(counts[15]), sum(counts[16]), sum(counts[17]), sum(counts[18]),
        sum(counts[19]), sum(counts[20]), sum(counts[21]), sum(counts[22]), sum(counts[23]), sum(counts[24])
    ]],
    lambda totals: case when list_sum(totals) > 0 then 1 + len(list_filter(
        range(1, 25), lambda bucket: list_sum(totals[1:bucket]) < greatest(ceil(share * list_sum(totals)), 1)
    )) end
)[1]];

-- Table: one row per model, account and interval with output tokens, since a time. A request's tokens count as
-- evenly spread from its first to its last, and add up to its `output_tokens`.
create macro tokens_by_interval(interval_ns, since_ns := 0) as table
with spans as (
    select
        model,
        account,
        output_tokens::hugeint as tokens,
        first_token_at_ns as first_ns,
        last_token_at_ns + 1 as end_ns
    from requests
    where output_tokens > 0 and last_token_at_ns >= since_ns // interval_ns * interval_ns
),
cut as (
    select *, unnest(range(
        greatest(first_ns, since_ns) // interval_ns, (end_ns - 1) // interval_ns + 1
    )) as number
    from spans
)
select
    model,
    account,
    number * interval_ns as from_ns,
    sum(
        tokens * (least(end_ns, (number + 1) * interval_ns) - first_ns) // (end_ns - first_ns)
        - tokens * (greatest(first_ns, number * interval_ns) - first_ns) // (end_ns - first_ns)
    ) as output_tokens
from cut
group by model, account, number;
