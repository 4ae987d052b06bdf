-- One row per request that an audit export of an account's month contains, with the sequence of its end:
-- requests that ended in the month, charged or not, or are on its invoice; the other requests of their groups;
-- and requests of earlier invoices that already paid for seconds in which this month's requests ran too.
with mine as (
    select request_id, group_id from requests
    where account = $account and finished_at_ns is not null and (
        strftime(make_timestamp(finished_at_ns // 1000), '%Y-%m') = $period
        or request_id in (select request_id from charges where account = $account and period = $period)
    )
),
ran as (
    select period, charges.model, request_id, started_at_ns, last_event_at_ns
    from charges join attempts using (request_id)
    where account = $account and plan = 'per_second' and period <= $period
),
named as (
    select request_id from mine
    union
    select requests.request_id from requests join mine using (group_id) where requests.account = $account
    union
    select older.request_id from ran as older join ran
        on ran.period = $period and older.period < $period and older.model = ran.model
        and older.started_at_ns < ran.last_event_at_ns and older.last_event_at_ns > ran.started_at_ns
)
select request_id, split_part(split_part(finished_position, ':', 2), '.', 1)::bigint
from requests join named using (request_id)
where finished_position is not null
