-- One row per event in order, with the columns of its record; a record without events has one row without an event.
select records.sequence, records.at_ns, records.subject, events.bare
from read_parquet($records) records
left join exploded($events) events using (sequence)
where records.sequence between $first and $last
order by records.sequence, events.place
