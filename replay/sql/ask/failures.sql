-- Show the requests that failed, were invalid, expired or could not be answered, by model and reason, and the account with the most of them
-- since (time, default 24h): requests that ended since then
-- model (text, optional): only this model
-- account (text, optional): only this account
select
    model,
    state,
    coalesce(error_code, case state when 'cancelled' then cancel_reason end, finish_reason) as reason,
    count(*) as requests,
    count(distinct account) as accounts,
    mode(account order by account) as most_affected,
    max(finished_at_ns) as last_at_ns,
    arg_max(request_id, finished_at_ns) as last_request_id
from requests
where finished_at_ns >= $since
    and (state in ('failed', 'invalid', 'poison', 'expired') or state = 'cancelled' and cancel_reason = 'unanswered')
    and model = coalesce($model, model)
    and account = coalesce($account, account)
group by model, state, reason
order by requests desc, model, state, reason
