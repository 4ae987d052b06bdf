-- One row per group of `$groups` whose prompt has been charged.
select distinct group_id
from facts.ended_requests
where billed_output_tokens > 0 and group_id in (select unnest($groups::varchar[]));
