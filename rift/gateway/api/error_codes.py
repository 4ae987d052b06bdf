"""Every error code: its statuses, the routes that answer it, when it occurs, and its remedy.

`/openapi.json` and ERRORS.md are generated from this table: `python -m rift.gateway.api.error_codes` writes
the page. A test compares the table with the codes in the source.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

PAGE = Path(__file__).parents[1] / "ERRORS.md"

# The routes that can answer an error: those with a key; with a scope of the key; new requests, of the native
# API and of OpenAI's; the answers to them; stored requests, their content, events and erasure; questions to
# the control process; a model by its name; `/readyz`.
Group = Literal[
    "all", "key", "scope", "submit", "native", "openai", "answer",
    "read", "content", "events", "erase", "question", "model", "ready",
]  # fmt: skip
STREAM = 0


class ErrorCode(NamedTuple):
    """`statuses` has STREAM if the code occurs in streams that have begun."""

    name: str
    statuses: tuple[int, ...]
    groups: tuple[Group, ...]
    when: str
    remedy: str


SAME = "Do not repeat it: it would fail again."
LATER = "Repeat it after `retry-after`."
OURS = "Nothing is charged. Repeat it; if it fails again, tell the operator."

CODES = (
    # Requests that are not answered as they are.
    ErrorCode("malformed_http", (400,), ("all",),
              "The request is not valid HTTP/1.1, or a proxy could read it differently.",
              "Send it with a current HTTP client; the message names the cause."),
    ErrorCode("websocket_unsupported", (400,), ("all",), "The request asks for a WebSocket.",
              "Set `stream` to true for server-sent events."),
    ErrorCode("head_timeout", (408,), ("all",), "The head of the request did not arrive in time.",
              "Repeat it."),
    ErrorCode("headers_too_large", (431,), ("all",), "The head of the request is too large.",
              "Send fewer or shorter headers."),
    ErrorCode("encoding_unsupported", (501,), ("all",), "The transfer encoding is not supported.",
              "Use `chunked`, or `Content-Length`."),
    ErrorCode("http_version", (505,), ("all",), "The request is not HTTP/1.0 or HTTP/1.1.",
              "Use HTTP/1.1, or a proxy for HTTP/2."),
    ErrorCode("too_many_connections", (503,), ("all",), "All connections of the gateway are busy.", LATER),
    ErrorCode("internal_error", (500,), ("all",), "The gateway failed to answer.",
              "Repeat it. The operator finds the cause in the gateway's log."),
    ErrorCode("not_found", (404,), (), "No route has this path.", "See `/docs` for the routes."),
    ErrorCode("method_not_allowed", (405,), ("all",), "The path does not support this method.",
              "Use a method that the header `allow` names."),
    # Keys.
    ErrorCode("missing_api_key", (401,), ("key",), "The request has no API key.",
              "Send the header `Authorization: Bearer rift_…`."),
    ErrorCode("invalid_api_key", (401,), ("key",), "The API key is unknown here.",
              "Check the key and the address of the installation."),
    ErrorCode("revoked_api_key", (401, STREAM), ("key",),
              "The API key was revoked, perhaps while a client read a stream with it.",
              "Ask the operator for another key."),
    ErrorCode("expired_api_key", (401,), ("key",), "The API key has expired.",
              "Ask the operator for another key."),
    ErrorCode("insufficient_scope", (403,), ("scope",), "The API key lacks the scope for this route.",
              "Use a key that has it: `inference`, `usage` or `admin`."),
    ErrorCode("model_not_allowed", (403,), ("submit", "model"), "The API key is not for this model.",
              "Use a model of `GET /v1/models`, or another key."),
    ErrorCode("book_unavailable", (503,), ("key", "ready"),
              "The gateway cannot confirm that it knows all keys and limits.",
              "Repeat it after `retry-after`, or at another gateway."),
    # Bodies and their fields.
    ErrorCode("unsupported_media_type", (415,), ("submit",),
              "The body is not `application/json`, or is compressed.",
              "Send the header `Content-Type: application/json`, and no `Content-Encoding`."),
    ErrorCode("body_timeout", (408,), ("submit",), "The body did not arrive in time, or too slowly.",
              "Repeat it."),
    ErrorCode("body_too_large", (413,), ("submit",),
              "The body, or the request as it is stored, is too large; the message has both sizes.",
              "Send less."),
    ErrorCode("invalid_json", (400,), ("submit",), "The body, or JSON inside a field, is not valid JSON.",
              "Correct it; the message says where."),
    ErrorCode("invalid_value", (400,), ("submit", "events", "answer"),
              "A field is missing, unknown, or has a value that is not allowed.",
              "Correct the field that `param` names."),
    ErrorCode("unsupported", (400,), ("openai",),
              "A field would change the answer, but Rift does not support it.",
              "Leave out the field that `param` names. `FIELDS.md` lists all."),
    ErrorCode("invalid_text", (400,), ("answer",),
              "The text is not valid Unicode: half of a surrogate pair.", "Correct the text."),
    ErrorCode("empty_prompt", (400,), ("answer",), "The prompt has no tokens.", "Send a longer prompt."),
    ErrorCode("invalid_messages", (400,), ("answer",),
              "The model's chat template rejects the messages, for example the order of the roles.",
              "Correct what the message names."),
    ErrorCode("no_chat_template", (400,), ("answer",), "The model has no chat template.",
              "Use `/v1/completions`, or `raw` in the native API."),
    ErrorCode("schema_too_large", (400,), ("openai",),
              "The JSON schemas are too long, or have too complex patterns, lengths, formats or properties.",
              "Do what the message says about the property that it names, or use smaller schemas."),
    ErrorCode("schema_unsupported", (400,), ("openai",), "The engine cannot enforce the JSON schema.",
              "Simplify the schema that `param` names."),
    ErrorCode("prompt_too_long", (400,), ("native",),
              "The prompt has more tokens than the native API or the model accepts.",
              "Shorten the prompt."),
    ErrorCode("max_tokens_too_large", (400,), ("native",),
              "The prompt and `max_tokens` together exceed the model's context.",
              "Set a smaller `max_tokens`, or shorten the prompt."),
    ErrorCode("context_length_exceeded", (400,), ("openai",),
              "The prompt, alone or with `max_tokens`, exceeds the model's context.",
              "Shorten the conversation, or set a smaller `max_tokens`."),
    ErrorCode("invalid", (400,), ("answer",), "The request was found invalid after it was accepted.",
              "Correct what the message names."),
    ErrorCode("invalid_idempotency_key", (400,), ("submit",),
              "The `Idempotency-Key` is empty or has more than 255 characters.",
              "Use 1 to 255 characters, such as a UUID."),
    ErrorCode("idempotency_key_reused", (422,), ("submit",),
              "The `Idempotency-Key` was used with another body within 24 hours.",
              "Use a new key for each new request."),
    ErrorCode("answer_removed", (410,), ("submit",),
              "The request of the `Idempotency-Key` is no longer stored.",
              "Use a new key to run it again."),
    # Models, money and limits.
    ErrorCode("model_not_found", (404,), ("submit", "model"), "No model has this name.",
              "Use a name of `GET /v1/models?all=true`."),
    ErrorCode("model_unavailable", (503, STREAM), ("submit", "answer"),
              "No replica serves the model, or three starts in a row failed.",
              "Repeat it later, or tell the operator."),
    ErrorCode("plan_without_price", (400,), ("submit",),
              "The account pays per second, and the model has no price per second.",
              "Use another model, or ask the operator for a price."),
    ErrorCode("credit_exhausted", (402,), ("submit",),
              "The account's credit does not cover the most that the request can cost.",
              "Set a smaller `max_tokens`, or add credit."),
    ErrorCode("budget_exhausted", (402,), ("submit",),
              "The account's budget of this month does not cover the most that the request can cost.",
              "Set a smaller `max_tokens`, or ask for a larger budget."),
    ErrorCode("requests_per_minute", (429,), ("submit",), "The limit of requests in 60 s is reached.",
              LATER),
    ErrorCode("tokens_per_minute", (429,), ("submit",), "The limit of tokens in 60 s is reached.",
              "Repeat it after `retry-after`. With `x-should-retry: false` it can never fit: send less."),
    ErrorCode("log_bytes_per_minute", (429,), ("submit",), "The limit of stored bytes in 60 s is reached.",
              "Repeat it after `retry-after`. With `x-should-retry: false` it can never fit: send less."),
    ErrorCode("concurrent_requests", (429,), ("submit",),
              "As many requests are running as the limit allows.", "Repeat it once one has ended."),
    ErrorCode("concurrent_bodies", (429,), ("submit",),
              "The gateway is reading 64 MiB or too many large bodies of the account.",
              "Send fewer at a time."),
    ErrorCode("concurrent_readers", (429,), ("submit", "read"),
              "Clients of the account read as many stored requests as they may.",
              "Repeat it once one has ended."),
    ErrorCode("concurrent_questions", (429,), ("question",), "Two queries of the account are in progress.",
              "Send one after the other."),
    ErrorCode("idempotency_keys", (429,), ("submit",),
              "The account has used all its idempotency keys of 24 hours.",
              "Send the request without `Idempotency-Key`, or wait."),
    ErrorCode("content_keys", (429,), ("submit",), "The account has as much encrypted content as it may.",
              "Repeat it after `retry-after`, or ask for a larger limit."),
    ErrorCode("queue_share", (429,), ("submit",), "The account fills its share of the model's queue.",
              LATER),
    ErrorCode("queue_full", (429,), ("submit",), "The model's queue is full.", LATER),
    ErrorCode("bodies_full", (503,), ("submit",), "The gateway is reading as many bodies as it can.",
              LATER),
    ErrorCode("idempotency_keys_full", (503,), ("submit",), "The log can store no more idempotency keys.",
              "Send the request without `Idempotency-Key`, or wait."),
    ErrorCode("content_keys_full", (503,), ("submit",),
              "The log can store no more keys of encrypted content.", LATER),
    # The log, and the process that answers questions.
    ErrorCode("log_full", (503,), ("all",), "The log, or its disk, is full.",
              "Repeat it after `retry-after`. The operator finds the cause with `rift status`."),
    ErrorCode("log_unavailable", (503, STREAM), ("all",), "The log does not answer, or stores nothing.",
              "Repeat it after `retry-after`. A native stream has the path to resume it in `resume`."),
    ErrorCode("gateway_stopping", (503, STREAM), ("submit", "answer", "events", "ready"),
              "The gateway is shutting down.",
              "Repeat it at another gateway, resume the stream, or fetch the answer by its id."),
    ErrorCode("control_unavailable", (503,), ("question",), "No control process answers.", LATER),
    ErrorCode("projection_blocked", (503,), ("question",),
              "The answer would lack stored records: the control process has not applied them yet, or "
              "cannot, because its disk is full or read-only or a record is unreadable or lost.",
              LATER),
    ErrorCode("answer_failed", (503,), ("question",), "The query failed.", "Repeat it, or ask for less."),
    # Ends of accepted requests.
    ErrorCode("revoked", (401, STREAM), ("answer",),
              "The API key was revoked while the request ran. Tokens until then are charged.",
              "Ask the operator for another key."),
    ErrorCode("expired", (504, STREAM), ("answer",), "The request was not answered before its deadline.",
              "Repeat it, with a smaller `max_tokens`."),
    ErrorCode("failed", (500, STREAM), ("answer",), "The request failed.", OURS),
    ErrorCode("poison", (500, STREAM), ("answer",),
              "Three engines stopped while they ran the request. Nothing is charged.", SAME),
    ErrorCode("engine_gave_up", (500, STREAM), ("answer",), "The engine stopped the request.", OURS),
    ErrorCode("not_continuable", (500, STREAM), ("answer",),
              "The worker was lost, and another one cannot continue the answer.", OURS),
    ErrorCode("prompt_unreadable", (500,), ("answer",),
              "The engine cannot read this prompt. Nothing is charged.",
              "Do not repeat it; tell the operator."),
    ErrorCode("unanswered", (503,), ("answer",),
              "The log did not answer in time, so the request was not accepted. Nothing is charged.",
              "Repeat it."),
    ErrorCode("slow_reader", (STREAM,), ("answer",), "The client reads too slowly.",
              "Resume the stream, and read faster."),
    ErrorCode("unreadable", (STREAM,), ("answer",),
              "The gateway is older than the worker that wrote the answer.",
              "Resume the stream at another gateway, or tell the operator."),
    # Stored requests, lists and sums.
    ErrorCode("request_not_found", (404,), ("read",), "No request of the account has this id.",
              "Check the id and the key."),
    ErrorCode("content_removed", (410, 500), ("submit", "content"),
              "The content of the request was erased, perhaps before it was answered.",
              "Send a new request, with a new key if it has one."),
    ErrorCode("content_not_sealed", (409,), ("erase",),
              "The request is not encrypted, so its content cannot be erased.",
              "Send requests with `store: false`."),
    ErrorCode("request_not_ended", (409,), ("erase",), "The request has not ended.",
              "Cancel it, or wait for its end."),
    ErrorCode("invalid_event_id", (400, STREAM), ("events",), "The request has no event of this number.",
              "Use the id of the last event that you have."),
    ErrorCode("invalid_query", (400,), ("question",),
              "A parameter of the query is not valid, or the answer would have too many rows.",
              "Correct what the message names."),
    ErrorCode("invalid_period", (400,), ("question",), "The month is not written as `YYYY-MM`.",
              "Write it like `2026-11`."),
)  # fmt: skip


def by_status(groups: Iterable[Group]) -> dict[int, list[ErrorCode]]:
    """Return the errors that a route of these groups can answer, by their status."""
    own = {"all", *groups}
    found: dict[int, list[ErrorCode]] = {}
    for code in CODES:
        for status in code.statuses:
            if status != STREAM and own & set(code.groups):
                found.setdefault(status, []).append(code)
    return dict(sorted(found.items()))


def page() -> str:
    """Return the text of ERRORS.md."""
    rows = [
        f"| `{code.name}` | {', '.join(str(each or 'stream') for each in code.statuses)} | {code.when} "
        f"| {code.remedy} |"
        for code in sorted(CODES)
    ]
    return "\n".join([HEAD, *rows, ""])


HEAD = """\
# Error codes

Every error is `{"error": {"message", "type", "param", "code"}}`. `message` says what is wrong and what to do,
`param` names the field or parameter, and `type` follows from the status. A program should decide by `code`:
codes do not change. `stream` means that the code can end a stream that has begun, where the status is 200.
`retry-after` (seconds) and `retry-after-ms` say when to repeat a request; `x-should-retry: false` says that
it would fail again. `/openapi.json` lists the codes of each route, and *What one account can hold* in
[`README.md`](README.md) has the numbers of the limits. In responses (`/v1/responses`), `error.type` has the
code, because OpenAI's clients know few values of `error.code`.

`python -m rift.gateway.api.error_codes` writes this page.

| code | status | when | remedy |
|---|---|---|---|"""

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
