-- The bare JSON of tokens.
create or replace temp macro tokens_json(attempt, token_index, tokens, cached_tokens) as concat(
    '{"type":"TokensGenerated","attempt":"', attempt, '","index":', token_index, ',"tokens":', tokens,
    ',"cached_tokens":' || cached_tokens, '}'
);

-- Every event of an events file with its bare JSON, with runs split into events.
create or replace temp macro exploded(path) as table
select sequence, place, at_ns, coalesce(json, bare_json) as bare
from read_parquet(path)
where sequences is null
union all
select
    sequence,
    place,
    at_ns,
    tokens_json(
        attempt, token_index, next_index - token_index, case when token_index = first_index then cached_tokens end
    ) as bare
from (
    select
        attempt,
        cached_tokens,
        token_index as first_index,
        unnest(sequences) as sequence,
        unnest(places) as place,
        unnest(times) as at_ns,
        unnest(indexes) as token_index,
        unnest(list_append(indexes[2:], token_index + tokens)) as next_index
    from read_parquet(path)
    where sequences is not null
);
