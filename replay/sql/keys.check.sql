-- No row: what is wrong with a key, and which.
select 'key issued twice' as wrong, key as which from keys group by key having count(*) > 1;
