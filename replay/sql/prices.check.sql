-- No rows, unless a price is wrong.
select 'model priced twice in a version' as wrong, model || ' in ' || version as which
from prices
group by version, model
having count(*) > 1
union all
select 'negative price', model || ' in ' || version
from prices
where least(prompt_nanousd, output_nanousd, coalesce(cached_prompt_nanousd, 0), coalesce(second_nanousd, 0)) < 0;
