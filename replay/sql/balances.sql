-- One row per account, with its credit.
create view balances as
with limits as (
    select account, unnest(arg_max({'plan': plan, 'budget_nanousd': budget_nanousd}, rowid))
    from facts.set_limits
    where key is null
    group by account
),
granted as (
    select account, sum(nanousd) as granted_nanousd from facts.granted_credits group by account
),
settled as (
    select hold, arg_min(nanousd, rowid) as nanousd from facts.settled_credits group by hold
),
held as (
    select
        account,
        coalesce(sum(held_credits.nanousd) filter (where settled.hold is null), 0) as held_nanousd,
        coalesce(sum(settled.nanousd), 0) as settled_nanousd
    from facts.held_credits
    left join settled on settled.hold = held_credits.id
    group by account
),
corrected as (
    select account, sum(nanousd) as corrected_nanousd from facts.corrections group by account
),
charged as (
    select account, sum(nanousd) as charged_nanousd from invoice_lines group by account
)
select
    accounts.account,
    coalesce(limits.plan, 'per_token') as plan,
    limits.budget_nanousd,
    granted.granted_nanousd,
    coalesce(held.held_nanousd, 0) as held_nanousd,
    coalesce(held.settled_nanousd, 0) as settled_nanousd,
    coalesce(corrected.corrected_nanousd, 0) as corrected_nanousd,
    coalesce(charged.charged_nanousd, 0) as charged_nanousd,
    granted.granted_nanousd - coalesce(held.held_nanousd, 0) - coalesce(held.settled_nanousd, 0)
        - coalesce(corrected.corrected_nanousd, 0) as available_nanousd
from accounts
left join limits using (account)
left join granted using (account)
left join held using (account)
left join corrected using (account)
left join charged using (account);
