-- One row per record in order, with what its segment's manifest says of it.
select sequence, at_ns, events, hash
from read_parquet($records)
order by sequence
