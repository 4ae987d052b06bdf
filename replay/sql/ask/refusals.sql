-- Show the requests that were answered with an error, by account and reason, the most frequent first
-- since (time, default 24h): reports that end after it
-- account (text, optional): only this account
select
    account,
    reason,
    sum(count) as requests,
    count(distinct gateway) as gateways,
    min(from_at_ns) as first_at_ns,
    max(to_at_ns) as last_at_ns
from refusals
where to_at_ns > $since and ($account is null or account = $account)
group by account, reason
order by requests desc, account, reason
