-- One row per accepted request in $requests: whether it has ended, and whether its charge is not corrected yet.
select
    request_id,
    account,
    model,
    plan,
    finished_at_ns is not null as has_ended,
    billed_output_tokens > 0 and corrected.id is null as is_charged,
    charge_nanousd
from requests
left join facts.book_entries as corrected on corrected.id = 'unanswered.' || request_id
where request_id in (select unnest($requests));
