-- No rows, unless a decision or an election that counts is wrong.
with counted as (
    select
        *,
        split_part(split_part(position, ':', 2), '.', 1)::bigint as sequence,
        split_part(position, '.', 2)::bigint as place
    from decisions
    where counts
),
chained as (
    select
        *,
        lag(to_replicas) over (partition by model order by sequence, place) as decided_before,
        lag(from_replicas) over (partition by model order by sequence, place) as from_before,
        lag(epoch) over (partition by model order by sequence, place) as epoch_before,
        max(epoch) over (
            order by sequence, place rows between unbounded preceding and 1 preceding
        ) as highest_before
    from counted
),
led as (
    select *, lag(epoch) over (order by rowid) as epoch_before from facts.held_elections where counts
)
select 'decided from a number other than the latest decision' as wrong, position as which
from chained
where from_replicas <> decided_before
union all
select 'decided twice', position from chained
where epoch = epoch_before and from_replicas = from_before and to_replicas = decided_before
union all
select 'decided in an old epoch', position from chained
where epoch < highest_before
union all
select 'decided in an epoch without a leader', position from chained
where epoch > 0 and epoch not in (select epoch from led)
union all
select 'elected in an old epoch', position from led
where epoch <= epoch_before;
