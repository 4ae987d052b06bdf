-- One row per gateway that reported refused requests, with the end of its last report.
select gateway, max(to_at_ns) from facts.counted_refusals group by gateway
