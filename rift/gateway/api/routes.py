"""The one route table: the app routes by it, `/openapi.json` is generated from it, and tests check answers
against it."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

import msgspec

from rift.gateway.api import schemas
from rift.gateway.api.billing import BillingRoutes
from rift.gateway.api.health import HealthRoutes
from rift.gateway.api.models import ModelRoutes
from rift.gateway.api.requests import RequestRoutes
from rift.gateway.api.responses import ResponseRoutes
from rift.gateway.dialects.dialect import CHAT, COMPLETIONS, NATIVE, RESPONSES, Dialect
from rift.gateway.submission.submit import Submission

# Takes the request and the path's `{id}`, if there is one.
Handler = Callable[..., Awaitable[None]]

# Statuses of errors that each kind of route can answer. Every route can answer 405 and 503 too.
SUBMITTED = (400, 401, 402, 404, 408, 410, 413, 415, 422, 429, 500, 504)
READ = (401, 404, 408, 429)
READ_CONTENT = (*READ, 410)
REMOVED = (*READ, 409)
BILLED = (400, 401, 403, 408, 429)
PUBLIC = (408,)


class Handlers(NamedTuple):
    submission: Submission
    native: Dialect
    requests: RequestRoutes
    responses: ResponseRoutes
    models: ModelRoutes
    billing: BillingRoutes
    health: HealthRoutes


class ResponseSpec(msgspec.Struct, frozen=True):
    """The answer of one status: the type of a JSON body, and those of the `data:` lines of an SSE body."""

    description: str
    body: Any = None
    stream: tuple[Any, ...] = ()


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """`path` is a template with at most one `{id}`, which matches `id_pattern`."""

    method: str
    path: str
    handler: Callable[[Handlers], Handler]
    summary: str
    answers: dict[int, ResponseSpec]
    errors: tuple[int, ...]
    body: type[msgspec.Struct] | None = None
    parameters: tuple[dict[str, Any], ...] = ()
    id_pattern: str = "[^/]+"
    is_public: bool = False


def _submit(dialect: Dialect) -> Callable[[Handlers], Handler]:
    return lambda to: partial(to.submission.infer, dialect)


def _query(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "For 24 hours, a request with the same key and body is the same request.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
}
EVENT_ID = {"type": "string", "pattern": r"^\d{1,9}$"}
DAY = {"type": "string", "format": "date"}

NATIVE_STREAM = (schemas.InferenceEvent, schemas.InferenceEnd)
HEALTHY = ResponseSpec("Yes.", schemas.Health)

ROUTES = (
    Route(
        method="POST",
        path="/v1/inference",
        handler=lambda to: partial(to.submission.infer, to.native),
        summary="Generate text.",
        body=NATIVE.body,
        parameters=(IDEMPOTENCY_KEY,),
        answers={
            200: ResponseSpec("The answer, whole or as a stream.", schemas.Inference, NATIVE_STREAM),
            202: ResponseSpec("The background request was accepted.", schemas.InferenceStatus),
        },
        errors=SUBMITTED,
    ),
    Route(
        method="POST",
        path="/v1/completions",
        handler=_submit(COMPLETIONS),
        summary="Complete a text (OpenAI's API).",
        body=COMPLETIONS.body,
        parameters=(IDEMPOTENCY_KEY,),
        answers={
            200: ResponseSpec(
                "The completion, whole or as a stream.",
                schemas.Completion,
                (schemas.Completion, schemas.Error),
            )
        },
        errors=SUBMITTED,
    ),
    Route(
        method="POST",
        path="/v1/chat/completions",
        handler=_submit(CHAT),
        summary="Answer a chat (OpenAI's API).",
        body=CHAT.body,
        parameters=(IDEMPOTENCY_KEY,),
        answers={
            200: ResponseSpec(
                "The answer, whole or as a stream.",
                schemas.ChatCompletion,
                (schemas.ChatCompletionChunk, schemas.Error),
            )
        },
        errors=SUBMITTED,
    ),
    Route(
        method="POST",
        path="/v1/responses",
        handler=_submit(RESPONSES),
        summary="Create a response (OpenAI's API).",
        body=RESPONSES.body,
        parameters=(IDEMPOTENCY_KEY,),
        answers={
            200: ResponseSpec("The response, or its events.", schemas.Response, (schemas.ResponseEvent,))
        },
        errors=SUBMITTED,
    ),
    Route(
        method="GET",
        path="/v1/inference",
        handler=lambda to: to.billing.requests,
        summary="List the account's requests, newest first.",
        parameters=(
            _query("limit", "Page size, 20 by default.", {"type": "integer", "minimum": 1, "maximum": 100}),
            _query("after", "The id of the previous page's last request.", {"type": "string"}),
        ),
        answers={200: ResponseSpec("One page.", schemas.InferenceList)},
        errors=BILLED,
    ),
    Route(
        method="GET",
        path="/v1/inference/{id}",
        handler=lambda to: to.requests.inference,
        summary="Get a request and its answer so far.",
        parameters=(ID,),
        answers={200: ResponseSpec("The request.", schemas.Inference)},
        errors=READ_CONTENT,
    ),
    Route(
        method="DELETE",
        path="/v1/inference/{id}",
        handler=lambda to: to.requests.cancel,
        summary="Cancel a request.",
        parameters=(ID,),
        answers={
            200: ResponseSpec("The request had already ended.", schemas.Inference),
            202: ResponseSpec("The request is being cancelled.", schemas.InferenceStatus),
        },
        errors=READ_CONTENT,
    ),
    Route(
        method="DELETE",
        path="/v1/inference/{id}/content",
        handler=lambda to: to.requests.remove,
        summary="Erase the content of a sealed request that has ended; its usage and charge stay.",
        parameters=(ID,),
        answers={200: ResponseSpec("The content is erased.", schemas.Deleted)},
        errors=REMOVED,
    ),
    Route(
        method="GET",
        path="/v1/inference/{id}/events",
        handler=lambda to: to.requests.resume,
        summary="Resume a request's stream after an event.",
        parameters=(ID, _query("after", "The id of the last event that the client has.", EVENT_ID)),
        answers={
            200: ResponseSpec("The events.", stream=NATIVE_STREAM),
            204: ResponseSpec("The client has the last event."),
        },
        errors=(400, *READ_CONTENT),
    ),
    Route(
        method="GET",
        path="/v1/responses/{id}",
        handler=lambda to: to.responses.response,
        summary="Get a response so far, or replay its events.",
        parameters=(
            ID,
            _query("stream", "`true` for the events.", {"type": "string", "enum": ["true", "false"]}),
            _query("starting_after", "The number of the last event that the client has.", EVENT_ID),
        ),
        answers={
            200: ResponseSpec("The response, or its events.", schemas.Response, (schemas.ResponseEvent,))
        },
        errors=(400, *READ_CONTENT),
    ),
    Route(
        method="DELETE",
        path="/v1/responses/{id}",
        handler=lambda to: to.responses.remove,
        summary="Erase the content of a sealed response that has ended; its usage and charge stay.",
        parameters=(ID,),
        answers={200: ResponseSpec("The content is erased.", schemas.Deleted)},
        errors=REMOVED,
    ),
    Route(
        method="POST",
        path="/v1/responses/{id}/cancel",
        handler=lambda to: to.responses.cancel,
        summary="Cancel a response.",
        parameters=(ID,),
        answers={200: ResponseSpec("The response; it has ended if that took under 3 s.", schemas.Response)},
        errors=READ_CONTENT,
    ),
    Route(
        method="GET",
        path="/v1/models",
        handler=lambda to: to.models.all,
        summary="List the served models.",
        parameters=(_query("all", "`true` for every known model.", {"type": "string"}),),
        answers={200: ResponseSpec("The models.", schemas.ModelList)},
        errors=(401, 408),
    ),
    Route(
        method="GET",
        path="/v1/models/{id}",
        handler=lambda to: to.models.one,
        summary="Get a model.",
        parameters=(ID,),
        # A model's name may contain slashes.
        id_pattern=".+",
        answers={200: ResponseSpec("The model.", schemas.Model)},
        errors=READ,
    ),
    Route(
        method="GET",
        path="/v1/invoices",
        handler=lambda to: to.billing.invoices,
        summary="List the account's invoices, newest first.",
        parameters=(
            _query("limit", "Page size, 20 by default.", {"type": "integer", "minimum": 1, "maximum": 100}),
            _query("after", "The month of the previous page's last invoice.", {"type": "string"}),
        ),
        answers={200: ResponseSpec("One page.", schemas.InvoiceList)},
        errors=BILLED,
    ),
    Route(
        method="GET",
        path="/v1/invoices/{id}",
        handler=lambda to: to.billing.invoice,
        summary="Get the account's invoice of a month, `YYYY-MM`.",
        parameters=(ID,),
        answers={200: ResponseSpec("The invoice.", dict[str, Any])},
        errors=BILLED,
    ),
    Route(
        method="GET",
        path="/v1/usage",
        handler=lambda to: to.billing.usage,
        summary="Sum the account's usage.",
        parameters=(
            _query("from", "The first day (UTC).", DAY),
            _query("to", "The last day (UTC), inclusive.", DAY),
            _query(
                "group_by",
                "Columns, separated by commas: hour, day, model, key, plan. At most 10,000 rows.",
                {"type": "string"},
            ),
        ),
        answers={200: ResponseSpec("The sums.", dict[str, Any])},
        errors=BILLED,
    ),
    *(
        Route(
            method="GET",
            path=path,
            handler=lambda to: to.health.alive,
            summary="Check that the process runs.",
            answers={200: HEALTHY},
            errors=PUBLIC,
            is_public=True,
        )
        for path in ("/health", "/livez")
    ),
    Route(
        method="GET",
        path="/readyz",
        handler=lambda to: to.health.ready,
        summary="Check that the gateway accepts requests.",
        answers={200: HEALTHY},
        errors=PUBLIC,
        is_public=True,
    ),
    Route(
        method="GET",
        path="/version",
        handler=lambda to: to.health.version,
        summary="Get the version.",
        answers={200: ResponseSpec("The version.", schemas.Version)},
        errors=PUBLIC,
        is_public=True,
    ),
    Route(
        method="GET",
        path="/openapi.json",
        handler=lambda to: to.health.openapi,
        summary="Get this document.",
        answers={200: ResponseSpec("The document.", dict[str, Any])},
        errors=PUBLIC,
        is_public=True,
    ),
)
