-- One row: the lowest sequence of $stream that accepted a request under way, or null.
select min(split_part(split_part(accepted_position, ':', 2), '.', 1)::bigint) as sequence
from requests
where finished_position is null and starts_with(accepted_position, $stream || ':');
