-- One row per accepted request in $requests: whether it has ended, and whether its charge is not corrected yet.
select
    request_id,
    account,
    requests.model,
    requests.price_version,
    plan,
    finished_at_ns is not null as has_ended,
    billed_output_tokens > 0 and corrected.id is null as is_charged,
    charge_nanousd,
    coalesce(second_nanousd, 0) as second_nanousd
from requests
left join facts.book_entries as corrected on corrected.id = 'unanswered.' || request_id
left join prices on prices.version = requests.price_version and prices.model = requests.model
where request_id in (select unnest($requests));
