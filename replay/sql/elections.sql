-- One row per candidacy of a control process for leader.
create view elections as
select
    epoch,
    control,
    counts,
    at_ns as elected_at_ns,
    position
from facts.held_elections;
