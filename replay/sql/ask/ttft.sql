-- Show the time to first token, the queue time and the gaps between tokens by model and hour (UTC) of acceptance
-- since (time, default 24h): requests accepted since then
-- model (text, optional): only this model
-- account (text, optional): only this account
select
    model,
    accepted_at_ns // 3600000000000 * 3600000000000 as hour_at_ns,
    count(*) as requests,
    count(ttft_ns) as with_tokens,
    quantile_disc(ttft_ns, 0.5) // 1000000 as ttft_p50_ms,
    quantile_disc(ttft_ns, 0.95) // 1000000 as ttft_p95_ms,
    quantile_disc(ttft_ns, 0.99) // 1000000 as ttft_p99_ms,
    quantile_disc(queue_ns, 0.5) // 1000000 as queue_p50_ms,
    quantile_disc(queue_ns, 0.95) // 1000000 as queue_p95_ms,
    itl_percentile_ns(itl_counts, 0.5) // 1000000 as gap_p50_ms,
    itl_percentile_ns(itl_counts, 0.99) // 1000000 as gap_p99_ms
from latency
where accepted_at_ns >= $since
    and model = coalesce($model, model)
    and account = coalesce($account, account)
group by model, hour_at_ns
order by model, hour_at_ns
