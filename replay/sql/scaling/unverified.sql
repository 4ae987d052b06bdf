-- One row: how many decisions and plans another version of the policy made.
select count(*) as made
from (select policy from decisions union all select policy from plans where counts)
where policy <> $policy;
