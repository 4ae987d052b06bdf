-- No row: what is wrong with a request, and which. The charge is computed again here, by the rule in SQL.
with ended as (
    select
        *,
        finish_reason in ('stop', 'length', 'tool_calls', 'cancelled', 'revoked', 'expired')
            and ended_by <> 'control'
            and cancel_reason is distinct from 'unanswered'
            and output_tokens > 0
            and plan = 'per_token' as is_chargeable
    from requests
    where finished_at_ns is not null
)
select 'charged otherwise than tokens by price' as wrong, ended.request_id as which
from ended
left join prices on prices.version = ended.price_version and prices.model = ended.model
where ended.charge_nanousd is distinct from case
    when not is_chargeable then 0
    else ended.prompt_tokens::hugeint * prices.prompt_nanousd
        + ended.output_tokens::hugeint * prices.output_nanousd
end
union all
select 'request entered twice', request_id from requests group by request_id having count(*) > 1
union all
select 'charged before its end', request_id from requests where finished_at_ns is null and charge_nanousd <> 0
union all
select 'state and end disagree', request_id from requests
where (state in ('queued', 'running')) <> (finished_at_ns is null)
    or (finish_reason is null) <> (finished_at_ns is null)
union all
select 'terminal event repeats other billing facts', request_id from facts.ended_requests where finish_differs
union all
select 'times out of order', request_id from requests
where started_at_ns < accepted_at_ns
    or first_token_at_ns < started_at_ns
    or last_token_at_ns < first_token_at_ns
    or finished_at_ns < coalesce(last_token_at_ns, accepted_at_ns);
