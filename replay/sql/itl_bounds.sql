-- One row per bucket of `itl_counts`: gaps from `from_ns` up to, not including, `below_ns` (null: no bound).
create view itl_bounds as
with bounds as (
    select
        unnest([
            1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024,
            2048, 4096, 8192, null
        ]::bigint[]) * 1000000 as below_ns,
        generate_subscripts(range(24), 1) as bucket
)
select
    bucket,
    coalesce(lag(below_ns) over (order by bucket), 0) as from_ns,
    below_ns
from bounds;
