-- One row per ended request of a model after the given one, in the order of acceptance.
select accepted_at_ns, prompt_tokens, output_tokens, request_id from requests
where model = $model and finished_at_ns is not null and (accepted_at_ns, request_id) > ($after_ns, $after_id)
order by accepted_at_ns, request_id limit $limit
