"""`/openapi.json`, generated from the route table and its types: OpenAPI 3.1."""

from collections.abc import Sequence
from typing import Any

import msgspec

from rift import __version__
from rift.gateway.api import schemas
from rift.gateway.api.routes import ResponseSpec, Route

JSON = "application/json"
SSE = "text/event-stream"

ERRORS = {
    400: "A field is invalid or not supported; `param` names it.",
    401: "The API key is missing or invalid.",
    402: "The account's credit or budget does not cover the highest possible cost of the request.",
    403: "The API key does not permit this.",
    404: "The model or the request does not exist, or belongs to another account.",
    405: "The path does not support this method.",
    408: "The body did not arrive in time.",
    409: "The content cannot be erased: the request has not ended, or was not sealed.",
    410: "The idempotency key's request is no longer stored, or the request's content was erased.",
    413: "The body is too large.",
    415: "The body is not `application/json`.",
    422: "The idempotency key was used with another body.",
    429: "A limit of the account or the key is reached, the model's queue is full, or too many of the "
    "account's billing queries are in progress; `code` names it, and `retry-after` says when to try again.",
    500: "The request failed on our side; nothing is charged.",
    503: "The log, the model or the control process is unavailable; `retry-after` says when to try again.",
    504: "The request was not answered before its deadline.",
}
# Every route can answer these.
ALWAYS = (405, 503)

HEADERS = {
    "x-request-id": "The id that the client sent in this header, or the request's own.",
    "rift-request-id": "The request's own id, once it is accepted; with `n` > 1 that of the first choice.",
    "openai-processing-ms": "Milliseconds until the answer began.",
}


def document(routes: Sequence[Route]) -> dict[str, Any]:
    types: list[Any] = [schemas.Error]
    for route in routes:
        types += [route.body] if route.body is not None else []
        for answer in route.answers.values():
            types += [answer.body] if answer.body is not None else []
            types += answer.stream
    converted, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    named = {id(kind): schema for kind, schema in zip(types, converted, strict=True)}
    paths: dict[str, Any] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, named)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Rift",
            "version": __version__,
            "description": "LLM inference; answers and invoices come from one log. OpenAI clients just work.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}],
    }


def _operation(route: Route, named: dict[int, Any]) -> dict[str, Any]:
    answers = dict(sorted(route.answers.items()))
    answers |= {
        status: ResponseSpec(ERRORS[status], schemas.Error) for status in sorted({*route.errors, *ALWAYS})
    }
    operation: dict[str, Any] = {
        "summary": route.summary,
        "operationId": f"{route.method.lower()} {route.path}",
        "responses": {str(status): _response(answer, named) for status, answer in answers.items()},
    }
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": named[id(route.body)]}}}
    if route.parameters:
        operation["parameters"] = list(route.parameters)
    if route.is_public:
        operation["security"] = []
    return operation


def _response(answer: ResponseSpec, named: dict[int, Any]) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": answer.description,
        "headers": {
            name: {"description": description, "schema": {"type": "string"}}
            for name, description in HEADERS.items()
        },
    }
    content = {}
    if answer.body is not None:
        content[JSON] = {"schema": named[id(answer.body)]}
    if answer.stream:
        # OpenAPI 3.1 cannot describe a stream's events: each `data:` line holds one of these.
        events = {"oneOf": [named[id(kind)] for kind in answer.stream]}
        schema = {"type": "string", "description": "Server-sent events.", "x-event-data": events}
        content[SSE] = {"schema": schema}
    if content:
        response["content"] = content
    return response
