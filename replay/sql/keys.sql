-- One row per key ever issued; key hashes are in the book only.
create view keys as
with revoked as (
    select key, account, min(at_ns) as revoked_at_ns from facts.revoked_keys group by key, account
)
select
    issued.key,
    issued.account,
    case when revoked_at_ns is null then 'issued' else 'revoked' end as state,
    scopes,
    models,
    at_ns as issued_at_ns,
    revoked_at_ns,
    expires_at_ns,
    position
from facts.issued_keys as issued
left join revoked on revoked.key = issued.key and revoked.account = issued.account;
