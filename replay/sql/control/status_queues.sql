-- One row per model with open requests: how many are queued, and how many run.
select model, count(*) filter (where state = 'queued') as queued,
    count(*) filter (where state = 'running') as running
from requests where finished_position is null group by model
