-- No rows, unless a report of refusals is wrong.
with reports as (
    select
        gateway,
        position,
        from_at_ns,
        to_at_ns,
        lag(to_at_ns) over (partition by gateway order by from_at_ns, to_at_ns) as last_to_at_ns
    from (select distinct gateway, position, from_at_ns, to_at_ns from refusals)
)
select 'interval runs backwards' as wrong, position as which from reports where to_at_ns <= from_at_ns
union all
select 'refusals counted twice', position from reports where from_at_ns < last_to_at_ns
union all
select 'refusals counted twice', position from refusals
group by position, account, reason
having count(*) > 1
union all
select 'a count is not positive', position from refusals where count < 1;
