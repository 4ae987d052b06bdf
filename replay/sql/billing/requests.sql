-- One row per request of an account, newest first; only those older than request `$after` if it is not null.
select
    request_id,
    model,
    kind,
    state,
    finish_reason,
    prompt_tokens,
    output_tokens,
    charge_nanousd,
    plan,
    group_id,
    choice,
    accepted_at_ns,
    finished_at_ns
from requests
where account = $account
    and ($after::varchar is null or (accepted_at_ns, request_id) < (
        select (accepted_at_ns, request_id) from requests where account = $account and request_id = $after
    ))
order by accepted_at_ns desc, request_id desc
limit $limit;
