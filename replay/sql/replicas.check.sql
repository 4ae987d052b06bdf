-- No rows, unless a replica is wrong.
select 'replica serves two models' as wrong, replica as which
from facts.replica_events
group by replica
having count(distinct model) > 1;
