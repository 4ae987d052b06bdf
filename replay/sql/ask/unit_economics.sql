-- Show by model what its replicas cost, how busy they were, and what its requests earned
-- since (time, default 24h): from the hour (UTC) that contains this time
-- model (text, optional): only this model
select
    model,
    sum(replica_seconds) as replica_seconds,
    sum(starting_replica_seconds) * 100 // nullif(sum(replica_seconds), 0) as starting_percent,
    sum(busy_replica_seconds) * 100 // nullif(sum(replica_seconds), 0) as busy_percent,
    sum(idle_replica_seconds) * 100 // nullif(sum(replica_seconds), 0) as idle_percent,
    sum(requests) as requests,
    sum(prompt_tokens) as prompt_tokens,
    sum(output_tokens) as output_tokens,
    sum(cost_nanousd) as cost_nanousd,
    sum(idle_nanousd) as idle_nanousd,
    sum(revenue_nanousd) as revenue_nanousd,
    sum(margin_nanousd) as margin_nanousd,
    sum(cost_nanousd) * 1000000 // nullif(sum(output_tokens), 0) as million_output_tokens_nanousd
from unit_economics
where epoch_ns(hour) >= $since // 3600000000000 * 3600000000000 and model = coalesce($model, model)
group by model
order by model
