-- One row per correction.
create view corrections as
select
    account,
    model,
    request_id,
    nanousd,
    reason,
    at_ns as corrected_at_ns,
    position
from facts.corrections;
