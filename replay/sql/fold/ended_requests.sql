-- One row per request of `$requests` that has ended. None was accepted at or before `$floor`, so only rows
-- after it are read.
select request_id
from facts.ended_requests
where accepted_sequence > $floor and request_id in (select unnest($requests::varchar[]));
