-- No row: what is wrong with a replica, and which.
select 'replica serves two models' as wrong, replica as which
from facts.replica_events
group by replica
having count(distinct model) > 1;
