-- The bucket of `itl_counts` that an interval belongs to; the bounds are those of relation `itl_bounds`.
create or replace temp macro itl_bucket(gap) as case
    when gap < 1000000 then 0
    when gap < 2000000 then 1
    when gap < 3000000 then 2
    when gap < 4000000 then 3
    when gap < 6000000 then 4
    when gap < 8000000 then 5
    when gap < 12000000 then 6
    when gap < 16000000 then 7
    when gap < 24000000 then 8
    when gap < 32000000 then 9
    when gap < 48000000 then 10
    when gap < 64000000 then 11
    when gap < 96000000 then 12
    when gap < 128000000 then 13
    when gap < 192000000 then 14
    when gap < 256000000 then 15
    when gap < 384000000 then 16
    when gap < 512000000 then 17
    when gap < 768000000 then 18
    when gap < 1024000000 then 19
    when gap < 2048000000 then 20
    when gap < 4096000000 then 21
    when gap < 8192000000 then 22
    else 23
end;

-- The number of intervals in each of the buckets.
create or replace temp macro itl_counts(buckets) as list_transform(
    range(24), lambda number: len(list_filter(buckets, lambda bucket: bucket = number))
);
