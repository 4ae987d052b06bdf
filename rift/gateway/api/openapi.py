"""`/openapi.json`, generated from the route table, its types and the table of errors: OpenAPI 3.1."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from rift import __version__
from rift.gateway.api import error_codes, schemas
from rift.gateway.api.routes import IDEMPOTENCY_KEY, ResponseSpec, Route

JSON = "application/json"
SSE = "text/event-stream"

DESCRIPTION = (
    "LLM inference; answers and invoices come from one log. OpenAI clients just work: set their base URL to "
    "this address with `/v1`, and their API key to one of Rift's. Every error has a code."
)

# The tag of a route is the second part of a path below `/v1`. In the order of the document.
TAGS = {
    "inference": "The native API: generate text, and read, resume, cancel and erase requests of all APIs.",
    "completions": "OpenAI's completions.",
    "chat": "OpenAI's chat completions.",
    "responses": "OpenAI's responses.",
    "models": "The models and their prices.",
    "invoices": "The account's invoices.",
    "usage": "The account's usage.",
    "gateway": "The gateway itself. These routes need no key.",
}


class Header(NamedTuple):
    """A header of answers. `has` says whether a route's answer of a status can have it."""

    description: str
    kind: str
    example: str
    has: Callable[[Route, int], bool]


def _is_limited(route: Route, status: int) -> bool:
    return "key" in route.errors and status < 500 and status not in (401, 431)


HEADERS = {
    "x-request-id": Header(
        "The id that the client sent in this header, or the request's own.",
        "string",
        "mine-1",
        lambda *_: True,
    ),
    "rift-request-id": Header(
        "The request's own id, once it is accepted; of several choices, that of the first.",
        "string",
        "req_0_yjz2ahqp6yb5dlxi_smollm2-135m_10_4tqhs2xk6f5vw3ma_7gk2wq5dbn4x",
        lambda route, _: bool({"submit", "read"} & set(route.errors)),
    ),
    "traceparent": Header(
        "The request's trace and its own span in it, by W3C Trace Context, once it is accepted.",
        "string",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        lambda route, _: bool({"submit", "read"} & set(route.errors)),
    ),
    "openai-processing-ms": Header("Milliseconds until the answer began.", "integer", "12", lambda *_: True),
    "server-timing": Header(
        "The times that are known when the answer begins, in milliseconds, for the tools of browsers.",
        "string",
        "app;dur=2.1, queue;dur=15.0",
        lambda *_: True,
    ),
    "idempotent-replayed": Header(
        "`true` if an earlier request had the same `Idempotency-Key`.",
        "string",
        "true",
        lambda route, status: IDEMPOTENCY_KEY in route.parameters and status < 300,
    ),
    "retry-after": Header(
        "When to try again, in seconds.", "integer", "1", lambda _, status: status in (429, 503)
    ),
    "retry-after-ms": Header(
        "When to try again, in milliseconds.", "integer", "640", lambda _, status: status in (429, 503)
    ),
    "x-should-retry": Header(
        "`false` if the same request would fail again.", "string", "false", lambda _, status: status >= 400
    ),
    **{
        f"x-ratelimit-{what}-{name}": Header(f"{words} {of}", kind, example, _is_limited)
        for name, of in (
            ("requests", "requests per minute."),
            ("tokens", "tokens per minute."),
            ("concurrent", "concurrent requests."),
        )
        for what, words, kind, example in (
            ("limit", "If there is one: the limit of", "integer", "60"),
            ("remaining", "How many are left of the", "integer", "59"),
            ("reset", "How long until the whole limit is available again, of the", "string", "59.000s"),
        )
        if (what, name) != ("reset", "concurrent")
    },
    "www-authenticate": Header("How to send a key.", "string", "Bearer", lambda _, status: status == 401),
    "allow": Header("The methods of the path.", "string", "GET", lambda _, status: status == 405),
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
    _simplify(components)
    for field in fields(components):
        if "const" in field:
            field.setdefault("description", f"Always `{json.dumps(field['const'])}`.")
    paths: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for route in routes:
        operation = _operation(route, named)
        operation["responses"] |= _shared(operation, shared)
        for status, answer in route.answers.items():
            if answer.body is not None:
                example = _example(named[id(answer.body)], components)
                operation["responses"][str(status)]["content"][JSON]["example"] = example
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Rift", "version": __version__, "description": DESCRIPTION},
        "servers": [{"url": "/", "description": "This gateway."}],
        "tags": [{"name": name, "description": words} for name, words in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": components,
            "responses": shared,
            "headers": {
                name: {
                    "description": header.description,
                    "schema": {"type": header.kind},
                    "example": int(header.example) if header.kind == "integer" else header.example,
                }
                for name, header in HEADERS.items()
            },
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "An API key, `rift_…`."}
            },
        },
        "security": [{"key": []}],
    }


def _simplify(node: Any) -> None:
    """Replace what is valid, but what programs that generate clients do not understand."""
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _simplify(inner)
    if not isinstance(node, dict):
        return
    if node.get("type") == "array":
        node.setdefault("items", {})
    if isinstance(node.get("enum"), list):
        node |= _one_of(node.pop("enum"))


def _one_of(values: list[Any]) -> dict[str, Any]:
    """Return a schema of these values: without a limit if they have several types besides null."""
    some = [value for value in values if value is not None]
    if len({type(value) for value in some}) > 1:
        return {}
    found = {"const": some[0]} if len(some) == 1 else {"type": "string", "enum": some}
    return found if len(some) == len(values) else {"anyOf": [found, {"type": "null"}]}


def _example(schema: dict[str, Any], components: dict[str, Any]) -> Any:
    """Return an answer from the examples of its fields: with those that are required or have one."""
    if "examples" in schema:
        return schema["examples"][0]
    if "$ref" in schema:
        return _example(components[schema["$ref"].rpartition("/")[2]], components)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    if schema.get("type") == "object":
        required = schema.get("required", ())
        return {
            name: _example(field, components)
            for name, field in schema.get("properties", {}).items()
            if name in required or "examples" in field
        }
    if schema.get("type") == "array":
        return [_example(schema["items"], components)] if "$ref" in schema["items"] else []
    return {"string": "", "integer": 0, "number": 0, "boolean": False}.get(schema.get("type", ""))


def fields(components: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the schema of each field of each type."""
    for schema in components.values():
        yield from schema.get("properties", {}).values()


def _operation(route: Route, named: dict[int, Any]) -> dict[str, Any]:
    answers = dict(sorted(route.answers.items()))
    answers |= {
        status: ResponseSpec("\n".join(f"- `{code.name}`: {code.when}" for code in codes), schemas.Error)
        for status, codes in error_codes.by_status(route.errors).items()
    }
    _, first, *parts = route.path.split("/")
    operation: dict[str, Any] = {
        "tags": [parts[0] if first == "v1" else "gateway"],
        "summary": route.summary,
        "operationId": route.name,
        "responses": {str(status): _response(route, status, answers[status], named) for status in answers},
    }
    if route.body is not None:
        shown = {"schema": named[id(route.body)], "examples": route.examples}
        operation["requestBody"] = {"required": True, "content": {JSON: shown}}
    if route.parameters:
        operation["parameters"] = list(route.parameters)
    if route.is_public:
        operation["security"] = []
    return operation


def _shared(operation: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """Return references to the operation's errors. `shared` gets those that no earlier operation has."""
    references = {}
    for status, response in operation["responses"].items():
        if int(status) < 400:
            continue
        same = (name for name, other in shared.items() if name.startswith(status) and other == response)
        name = next(same, f"{status}_{operation['operationId']}")
        shared[name] = response
        references[status] = {"$ref": f"#/components/responses/{name}"}
    return references


def _response(route: Route, status: int, answer: ResponseSpec, named: dict[int, Any]) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": answer.description,
        "headers": {
            name: {"$ref": f"#/components/headers/{name}"}
            for name, header in HEADERS.items()
            if header.has(route, status)
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
