-- One row per closed period.
create view periods as
select
    period,
    digest,
    rules,
    positions,
    roots,
    at_ns as closed_at_ns,
    position
from facts.closed_periods;
