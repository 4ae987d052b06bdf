-- No rows, unless a key is wrong.
select 'key issued twice' as wrong, key as which from keys group by key having count(*) > 1;
