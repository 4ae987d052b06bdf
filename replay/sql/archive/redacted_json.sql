-- The bare JSON of an event that is not a run, from its columns; `bare_json` in other files stands for this.
-- It must equal what `events/redaction.py` makes.
case type
    when 'TokensGenerated' then tokens_json(attempt, token_index, tokens, cached_tokens)
    when 'RequestAccepted' then concat(
        '{"type":"RequestAccepted","request":"', request, '","account":"', account, '","key":"', key,
        '","model":"', model, '","kind":"', kind, '","input":"","parameters":', parameters,
        ',"stream":', stream, ',"prompt_tokens_max":', prompt_tokens_max, ',"deadline_ms":', deadline_ms,
        ',"price_version":', price_version, ',"plan":"' || plan || '"', ',"book":' || book,
        ',"allowance":"' || allowance || '"', ',"group":"' || group_id || '"', ',"choice":' || choice,
        ',"idempotency_hash":"' || idempotency_hash || '"', ',"rules":' || rules,
        ',"detached":' || detached, ',"traceparent":"' || traceparent || '"', '}'
    )
    when 'AttemptStarted' then concat(
        '{"type":"AttemptStarted","request":"', request, '","attempt":"', attempt,
        '","after":', coalesce('"' || "after" || '"', 'null'), ',"resume_index":', resume_index,
        ',"worker":"', worker, '","prompt_tokens":', prompt_tokens, ',"accepted_at_ns":', accepted_at_ns,
        ',"engine":"', engine, '","model_digest":"', model_digest, '","delivery":"', delivery, '"',
        ',"simulated":' || simulated, '}'
    )
    when 'RequestFinished' then concat(
        '{"type":"RequestFinished","request":"', request, '","attempt":', coalesce('"' || attempt || '"', 'null'),
        ',"reason":"', reason, '","output_tokens":', output_tokens,
        ',"error":{"code":"' || error_code || '","message":""' || coalesce(',"param":"' || error_param || '"', '') || '}',
        ',"account":"' || account || '"', ',"model":"' || model || '"', ',"price_version":' || price_version,
        ',"prompt_tokens":' || prompt_tokens,
        ',"stamps":{' || nullif(concat_ws(',', '"engine_ns":' || engine_ns,
            '"first_token_ns":' || first_token_ns, '"finished_ns":' || finished_ns), '') || '}', '}'
    )
    when 'AttemptReleased' then concat(
        '{"type":"AttemptReleased","attempt":"', attempt, '","why":"', why, '"}'
    )
    when 'CancelRequested' then concat(
        '{"type":"CancelRequested","request":"', request, '","why":"', why, '"', ',"attempt":"' || attempt || '"', '}'
    )
end
