-- One row per invoice line of a period; of one account, or of all if `$account` is null.
select
    account,
    model,
    plan,
    price_version,
    prompt_tokens,
    cached_tokens,
    output_tokens,
    seconds,
    nanousd,
    requests,
    first_position,
    last_position,
    digest
from invoice_lines
where period = $period and ($account::varchar is null or account = $account)
order by account, model, plan, price_version;
