-- One row per model and version of the price list.
create view prices as
select
    version,
    model,
    prompt_nanousd,
    output_nanousd,
    cached_prompt_nanousd,
    second_nanousd,
    at_ns as published_at_ns,
    position
from facts.published_prices;
