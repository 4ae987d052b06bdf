"""`/openapi.json`: every route with its fields and its answers, OpenAPI 3.1, from the types themselves."""

from typing import Any

import msgspec

from rift import __version__
from rift.gateway.api import schemas as shown
from rift.gateway.dialects.chat_request import ChatBody, CompletionBody
from rift.gateway.dialects.native import NativeBody
from rift.gateway.dialects.responses_request import ResponseBody

JSON = "application/json"
SSE = "text/event-stream"

ERRORS = {
    400: "A field is wrong, or asks for what is not served; `param` names it.",
    401: "No API key, or one that is not valid.",
    402: "The account's credit or budget does not cover the worst case of the request.",
    403: "The API key may not do this.",
    404: "There is no such model, or no such request of this account.",
    405: "The path takes other methods.",
    408: "The body did not arrive in time.",
    409: "The content cannot be removed: the request has not ended, or was not sealed.",
    410: "What an idempotency key stands for is no longer kept, or the request's content was removed.",
    413: "The body is too large.",
    415: "The body is not `application/json`.",
    422: "The idempotency key was used with another body.",
    429: "A limit of the account or of the key is reached, too many requests wait for the model, or too many "
    "questions of the account are under way; `code` names it, `retry-after` says when to come again.",
    500: "The request failed by our fault, and nothing is charged.",
    503: "The log, the model, or who would answer is not there now; `retry-after` says when to come again.",
    504: "The request was not answered before its deadline.",
}
ALWAYS = (405, 503)
NEW = (400, 401, 402, 404, 408, 410, 413, 415, 422, 429, 500, 504)
OLD = (401, 404, 408)
THERE = (*OLD, 410)
ASKED = (400, 401, 403, 408, 429)

HEADERS = {
    "x-request-id": ("What the answer is called: by the client, or the request's id.", "string"),
    "openai-processing-ms": ("Milliseconds until the answer began.", "string"),
}

ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "A repeated request with the same key and body is the same request, for 24 hours.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}


class ResponseSpec(msgspec.Struct, frozen=True):
    """What a status is answered with: `stream` is what the `data:` of an SSE answer holds."""

    description: str
    types: tuple[Any, ...] = ()
    stream: tuple[Any, ...] = ()


class Operation(msgspec.Struct, frozen=True):
    method: str
    path: str
    summary: str
    answers: dict[int, ResponseSpec]
    errors: tuple[int, ...] = ()
    body: Any = None
    parameters: tuple[dict[str, Any], ...] = ()
    is_public: bool = False


def query(name: str, words: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": words, "schema": schema}


def _new(path: str, summary: str, body: Any, answers: dict[int, ResponseSpec]) -> Operation:
    return Operation("post", path, summary, answers, NEW, body, (KEY,))


NATIVE_STREAM = (shown.InferenceEvent, shown.InferenceEnd)
AFTER = {"type": "string", "pattern": r"^\d{1,9}$"}
DAY = {"type": "string", "format": "date"}

OPERATIONS = (
    _new(
        "/v1/inference",
        "Generate text.",
        NativeBody,
        {
            200: ResponseSpec("The whole answer, or its stream.", (shown.Inference,), NATIVE_STREAM),
            202: ResponseSpec("A background request was accepted.", (shown.InferenceStatus,)),
        },
    ),
    _new(
        "/v1/completions",
        "Complete a text, as OpenAI's clients ask for it.",
        CompletionBody,
        {
            200: ResponseSpec(
                "The completion, or its stream.", (shown.Completion,), (shown.Completion, shown.Error)
            )
        },
    ),
    _new(
        "/v1/chat/completions",
        "Answer a chat, as OpenAI's clients ask for it.",
        ChatBody,
        {
            200: ResponseSpec(
                "The answer, or its stream.",
                (shown.ChatCompletion,),
                (shown.ChatCompletionChunk, shown.Error),
            )
        },
    ),
    _new(
        "/v1/responses",
        "Make a response, as OpenAI's clients ask for it.",
        ResponseBody,
        {200: ResponseSpec("The response, or its events.", (shown.Response,), (shown.ResponseEvent,))},
    ),
    Operation(
        "get",
        "/v1/inference",
        "The account's requests, newest first.",
        {200: ResponseSpec("A page of them.", (shown.InferenceList,))},
        ASKED,
        None,
        (
            query("limit", "How many: 20.", {"type": "integer", "minimum": 1, "maximum": 100}),
            query("after", "The id that the page is behind.", {"type": "string"}),
        ),
    ),
    Operation(
        "get",
        "/v1/inference/{id}",
        "A request's answer so far.",
        {200: ResponseSpec("The inference.", (shown.Inference,))},
        THERE,
        None,
        (ID,),
    ),
    Operation(
        "delete",
        "/v1/inference/{id}",
        "Cancel a request.",
        {
            200: ResponseSpec("The request had ended.", (shown.Inference,)),
            202: ResponseSpec("The request is being cancelled.", (shown.InferenceStatus,)),
        },
        THERE,
        None,
        (ID,),
    ),
    Operation(
        "delete",
        "/v1/inference/{id}/content",
        "Remove the content of a request that was sealed and has ended; its facts stay.",
        {200: ResponseSpec("It is removed.", (shown.Deleted,))},
        (*OLD, 409),
        None,
        (ID,),
    ),
    Operation(
        "get",
        "/v1/inference/{id}/events",
        "A request's stream, behind an event.",
        {
            200: ResponseSpec("The events.", (), NATIVE_STREAM),
            204: ResponseSpec("There is nothing behind this event, and nothing will come."),
        },
        (400, *THERE),
        None,
        (ID, query("after", "The last event that the client has.", AFTER)),
    ),
    Operation(
        "get",
        "/v1/responses/{id}",
        "A response so far, or its events again.",
        {200: ResponseSpec("The response, or its events.", (shown.Response,), (shown.ResponseEvent,))},
        (400, *THERE),
        None,
        (
            ID,
            query("stream", "`true` for the events.", {"type": "string", "enum": ["true", "false"]}),
            query("starting_after", "The number of the last event that the client has.", AFTER),
        ),
    ),
    Operation(
        "delete",
        "/v1/responses/{id}",
        "Remove the content of a response that was sealed and has ended; its facts stay.",
        {200: ResponseSpec("It is removed.", (shown.Deleted,))},
        (*OLD, 409),
        None,
        (ID,),
    ),
    Operation(
        "post",
        "/v1/responses/{id}/cancel",
        "Cancel a response.",
        {200: ResponseSpec("The response, with its end if that came soon.", (shown.Response,))},
        THERE,
        None,
        (ID,),
    ),
    Operation(
        "get",
        "/v1/models",
        "The models that are served.",
        {200: ResponseSpec("The list.", (shown.ModelList,))},
        (401, 408),
        None,
        (query("all", "`true` for every model that is known.", {"type": "string"}),),
    ),
    Operation(
        "get",
        "/v1/models/{id}",
        "One model.",
        {200: ResponseSpec("The model.", (shown.Model,))},
        OLD,
        None,
        (ID,),
    ),
    Operation(
        "get",
        "/v1/invoices/{id}",
        "The account's invoice of a month, `YYYY-MM`.",
        {200: ResponseSpec("The invoice.", (dict[str, Any],))},
        ASKED,
        None,
        (ID,),
    ),
    Operation(
        "get",
        "/v1/usage",
        "The account's usage, summed.",
        {200: ResponseSpec("The sums.", (dict[str, Any],))},
        ASKED,
        None,
        (
            query("from", "The first day (UTC).", DAY),
            query("to", "The last day (UTC), counted too.", DAY),
            query("group_by", "A list with commas.", {"type": "string"}),
        ),
    ),
    Operation(
        "get", "/health", "Alive.", {200: ResponseSpec("Yes.", (shown.Health,))}, (408,), is_public=True
    ),
    Operation(
        "get", "/livez", "Alive.", {200: ResponseSpec("Yes.", (shown.Health,))}, (408,), is_public=True
    ),
    Operation(
        "get",
        "/readyz",
        "Ready to accept.",
        {200: ResponseSpec("Yes.", (shown.Health,))},
        (408,),
        is_public=True,
    ),
    Operation(
        "get",
        "/version",
        "The version.",
        {200: ResponseSpec("It.", (shown.Version,))},
        (408,),
        is_public=True,
    ),
    Operation(
        "get",
        "/openapi.json",
        "This document.",
        {200: ResponseSpec("It.", (dict[str, Any],))},
        (408,),
        is_public=True,
    ),
)


def document() -> dict[str, Any]:
    types = [shown.Error]
    for operation in OPERATIONS:
        types += [operation.body] if operation.body is not None else []
        for answer in operation.answers.values():
            types += [*answer.types, *answer.stream]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    named = {id(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, Any] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, named)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Rift",
            "version": __version__,
            "description": "Inference whose answers and bills come from one log; OpenAI's clients just work.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _operation(operation: Operation, named: dict[int, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method} {operation.path}",
        "responses": {
            str(status): _answer(answer, named) for status, answer in sorted(operation.answers.items())
        },
    }
    for status in sorted({*operation.errors, *ALWAYS}):
        error = ResponseSpec(ERRORS[status], (shown.Error,))
        told["responses"][str(status)] = _answer(error, named)
    if operation.body is not None:
        told["requestBody"] = {
            "required": True,
            "content": {JSON: {"schema": named[id(operation.body)]}},
        }
    if operation.parameters:
        told["parameters"] = list(operation.parameters)
    if operation.is_public:
        told["security"] = []
    return told


def _answer(answer: ResponseSpec, named: dict[int, Any]) -> dict[str, Any]:
    content = {JSON: answer.types, SSE: answer.stream}
    told: dict[str, Any] = {
        "description": answer.description,
        "headers": {
            name: {"description": words, "schema": {"type": kind}} for name, (words, kind) in HEADERS.items()
        },
    }
    if shapes := {media: kinds for media, kinds in content.items() if kinds}:
        told["content"] = {media: {"schema": _one_of(media, kinds, named)} for media, kinds in shapes.items()}
    return told


def _one_of(media: str, kinds: tuple[Any, ...], named: dict[int, Any]) -> dict[str, Any]:
    schemas = [named[id(kind)] for kind in kinds]
    if media == SSE:
        # OpenAPI 3.1 has no word for a stream's events: each `data:` line holds one of these.
        return {"type": "string", "description": "Server-sent events.", "x-event-data": {"oneOf": schemas}}
    schema: dict[str, Any] = schemas[0]
    return schema
