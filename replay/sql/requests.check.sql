-- No rows, unless a request is wrong. The charge is computed again here, by the rule in SQL.
with ended as (
    select
        *,
        finish_reason in ('stop', 'length', 'tool_calls', 'cancelled', 'revoked', 'expired')
            and ended_by <> 'control'
            and cancel_reason is distinct from 'unanswered'
            and output_tokens > 0 as is_chargeable
    from requests
    where finished_at_ns is not null
),
first_of_group as (
    select group_id, arg_min(request_id, (finished_sequence, finished_index)) as request_id
    from facts.ended_requests
    join ended using (request_id, group_id)
    where is_chargeable and group_id is not null
    group by group_id
)
select 'charge is not billed tokens times price' as wrong, ended.request_id as which
from ended
left join prices on prices.version = ended.price_version and prices.model = ended.model
where ended.charge_nanousd is distinct from case
    when ended.plan <> 'per_token' then 0
    else ended.billed_prompt_tokens::hugeint * prices.prompt_nanousd
        + ended.billed_cached_tokens::hugeint * coalesce(prices.cached_prompt_nanousd, 0)
        + ended.billed_output_tokens::hugeint * prices.output_nanousd
end
union all
select 'billed output tokens differ from the log', request_id from ended
where billed_output_tokens <> case when is_chargeable then output_tokens else 0 end
union all
select 'billed prompt tokens differ from the log', ended.request_id
from ended
left join first_of_group using (group_id)
where billed_prompt_tokens + billed_cached_tokens <> case
    when is_chargeable and (group_id is null or first_of_group.request_id = ended.request_id)
        then prompt_tokens
    else 0
end
union all
select 'billed cached tokens differ from the price list or the log', ended.request_id
from ended
left join prices on prices.version = ended.price_version and prices.model = ended.model
where billed_prompt_tokens + billed_cached_tokens > 0
    and billed_cached_tokens <> case
        when prices.cached_prompt_nanousd is null then 0
        else least(cached_tokens, prompt_tokens)
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
select 'terminal event and acceptance differ in billing facts', request_id from facts.ended_requests where finish_differs
union all
select 'times out of order', request_id from requests
where started_at_ns < accepted_at_ns
    or first_token_at_ns < started_at_ns
    or last_token_at_ns < first_token_at_ns
    or finished_at_ns < coalesce(last_token_at_ns, accepted_at_ns);
