-- Show the output tokens per second by model and interval (UTC); intervals without tokens are left out
-- interval (duration, default 1m): length of an interval
-- since (time, default 1h): from the interval that contains this time
-- model (text, optional): only this model
-- account (text, optional): only this account
select
    model,
    from_ns as from_at_ns,
    sum(output_tokens) as output_tokens,
    round(sum(output_tokens) * 1000000000 / $interval, 1) as tokens_per_s
from tokens_by_interval($interval, since_ns := $since)
where model = coalesce($model, model) and account = coalesce($account, account)
group by model, from_ns
order by model, from_ns
