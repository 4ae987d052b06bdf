-- One row per account or key whose limits were ever set, with the limits in force.
create view limits as
select
    account,
    key,
    unnest(
        arg_max(
            {
                'plan': plan,
                'budget_nanousd': budget_nanousd,
                'requests_per_minute': requests_per_minute,
                'tokens_per_minute': tokens_per_minute,
                'concurrent': concurrent,
                'queue_share_percent': queue_share_percent,
                'set_at_ns': at_ns,
                'position': position,
            },
            rowid
        )
    )
from facts.set_limits
group by account, key;
