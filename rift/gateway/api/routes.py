"""The one route table: the app routes by it, `/openapi.json` is generated from it, and tests check answers
against it."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, NamedTuple

import msgspec

from rift.gateway.api import openai_schemas, schemas
from rift.gateway.api.billing import PAGE, PAGE_MAX, BillingRoutes
from rift.gateway.api.error_codes import Group
from rift.gateway.api.health import HealthRoutes
from rift.gateway.api.models import ModelRoutes
from rift.gateway.api.requests import RequestRoutes
from rift.gateway.api.responses import ResponseRoutes
from rift.gateway.asgi.trace_context import STATE_BYTES_MAX
from rift.gateway.dialects.dialect import CHAT, COMPLETIONS, NATIVE, RESPONSES, Dialect
from rift.gateway.submission.idempotency import KEY_CHARACTERS_MAX
from rift.gateway.submission.submit import Submission

# Takes the request and the path's `{id}`, if there is one.
Handler = Callable[..., Awaitable[None]]

# What each kind of route has in common with others, for its errors.
SUBMITTED: tuple[Group, ...] = ("key", "scope", "submit", "answer")
READ: tuple[Group, ...] = ("key", "scope", "read")
READ_CONTENT: tuple[Group, ...] = (*READ, "content")
EVENTS: tuple[Group, ...] = (*READ_CONTENT, "events")
ASKED: tuple[Group, ...] = ("key", "scope", "question")


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

    # The `operationId`: generated clients name their functions by it.
    name: str
    method: str
    path: str
    handler: Callable[[Handlers], Handler]
    summary: str
    answers: dict[int, ResponseSpec]
    errors: tuple[Group, ...]
    body: type[msgspec.Struct] | None = None
    # Bodies, by their name.
    examples: dict[str, Any] = {}
    parameters: tuple[dict[str, Any], ...] = ()
    id_pattern: str = "[^/]+"
    is_public: bool = False


def _submit(dialect: Dialect) -> Callable[[Handlers], Handler]:
    return lambda to: partial(to.submission.infer, dialect)


def _id(description: str, example: str) -> dict[str, Any]:
    shown = {"description": description, "example": example}
    return {"name": "id", "in": "path", "required": True, **shown, "schema": {"type": "string"}}


def _query(name: str, description: str, schema: dict[str, Any], example: Any) -> dict[str, Any]:
    shown = {"description": description, "example": example}
    return {"name": name, "in": "query", "required": False, **shown, "schema": schema}


def _header(name: str, description: str, schema: dict[str, Any], example: str) -> dict[str, Any]:
    return _query(name, description, schema, example) | {"in": "header"}


REQUEST = _id("The request's id.", "req_0_yjz2ahqp6yb5dlxi_smollm2-135m_10_4tqhs2xk6f5vw3ma_7gk2wq5dbn4x")
RESPONSE = _id("The response's id.", "resp_0_yjz2ahqp6yb5dlxi_smollm2-135m_10_4tqhs2xk6f5vw3ma_7gk2wq5dbn4x")
IDEMPOTENCY_KEY = _header(
    "Idempotency-Key",
    "For 24 hours, a request with the same key and body is the same request: one answer and one charge.",
    {"type": "string", "minLength": 1, "maxLength": KEY_CHARACTERS_MAX},
    "7d8f3c1e-0c5b-4f0e-9a57-1d1f6f1f0b7a",
)
REQUEST_ID = _header(
    "X-Request-Id",
    "The client's own id for the request: 1 to 128 visible ASCII characters, otherwise ignored.",
    {"type": "string"},
    "mine-1",
)
TRACEPARENT = _header(
    "traceparent",
    "The trace that the request continues, by W3C Trace Context; ignored if it is not valid.",
    {"type": "string"},
    "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
)
TRACESTATE = _header(
    "tracestate",
    f"Stored with a valid `traceparent`, if it has at most {STATE_BYTES_MAX} bytes.",
    {"type": "string"},
    "vendor=a1",
)
NEW = (IDEMPOTENCY_KEY, REQUEST_ID, TRACEPARENT, TRACESTATE)
PAGE_SIZE = _query(
    "limit", f"Page size, {PAGE} by default.", {"type": "integer", "minimum": 1, "maximum": PAGE_MAX}, PAGE
)
EVENT_ID = {"type": "string", "pattern": r"^\d{1,9}$"}
DAY = {"type": "string", "format": "date"}

# The examples of bodies.
MODEL_NAME = "smollm2:135m"
QUESTION = "Explain quantum computing to a 12-year-old."
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]

NATIVE_STREAM = (schemas.InferenceEvent, schemas.InferenceEnd)
HEALTHY = ResponseSpec("Yes.", schemas.Health)

ROUTES = (
    Route(
        name="create_inference",
        method="POST",
        path="/v1/inference",
        handler=lambda to: partial(to.submission.infer, to.native),
        summary="Generate text.",
        body=NATIVE.body,
        examples={
            "whole": {"value": {"model": MODEL_NAME, "prompt": QUESTION, "parameters": {"max_tokens": 300}}},
            "stream": {"value": {"model": MODEL_NAME, "prompt": QUESTION, "stream": True}},
            "background": {"value": {"model": MODEL_NAME, "prompt": QUESTION, "background": True}},
        },
        parameters=NEW,
        answers={
            200: ResponseSpec("The answer, whole or as a stream.", schemas.Inference, NATIVE_STREAM),
            202: ResponseSpec("The background request was accepted.", schemas.InferenceStatus),
        },
        errors=(*SUBMITTED, "native"),
    ),
    Route(
        name="create_completion",
        method="POST",
        path="/v1/completions",
        handler=_submit(COMPLETIONS),
        summary="Complete a text (OpenAI's API).",
        body=COMPLETIONS.body,
        examples={
            "text": {"value": {"model": MODEL_NAME, "prompt": "Once upon a time", "max_tokens": 50}},
            "several": {
                "value": {"model": MODEL_NAME, "prompt": ["One, two,", "Red, green,"], "max_tokens": 9}
            },
        },
        parameters=NEW,
        answers={
            200: ResponseSpec(
                "The completion, whole or as a stream.",
                openai_schemas.Completion,
                (openai_schemas.Completion, schemas.Error),
            )
        },
        errors=(*SUBMITTED, "openai"),
    ),
    Route(
        name="create_chat_completion",
        method="POST",
        path="/v1/chat/completions",
        handler=_submit(CHAT),
        summary="Answer a chat (OpenAI's API).",
        body=CHAT.body,
        examples={
            "whole": {"value": {"model": MODEL_NAME, "messages": MESSAGES, "max_completion_tokens": 300}},
            "stream": {"value": {"model": MODEL_NAME, "messages": MESSAGES, "stream": True}},
        },
        parameters=NEW,
        answers={
            200: ResponseSpec(
                "The answer, whole or as a stream.",
                openai_schemas.ChatCompletion,
                (openai_schemas.ChatCompletionChunk, schemas.Error),
            )
        },
        errors=(*SUBMITTED, "openai"),
    ),
    Route(
        name="create_response",
        method="POST",
        path="/v1/responses",
        handler=_submit(RESPONSES),
        summary="Create a response (OpenAI's API).",
        body=RESPONSES.body,
        examples={
            "text": {"value": {"model": MODEL_NAME, "input": QUESTION, "max_output_tokens": 300}},
            "background": {"value": {"model": MODEL_NAME, "input": QUESTION, "background": True}},
        },
        parameters=NEW,
        answers={
            200: ResponseSpec(
                "The response, or its events.", openai_schemas.Response, (openai_schemas.ResponseEvent,)
            )
        },
        errors=(*SUBMITTED, "openai"),
    ),
    Route(
        name="list_inferences",
        method="GET",
        path="/v1/inference",
        handler=lambda to: to.billing.requests,
        summary="List the account's requests, newest first.",
        parameters=(
            PAGE_SIZE,
            _query(
                "after", "The id of the previous page's last request.", {"type": "string"}, REQUEST["example"]
            ),
        ),
        answers={200: ResponseSpec("One page.", schemas.InferenceList)},
        errors=ASKED,
    ),
    Route(
        name="get_inference",
        method="GET",
        path="/v1/inference/{id}",
        handler=lambda to: to.requests.inference,
        summary="Get a request and its answer so far.",
        parameters=(REQUEST,),
        answers={200: ResponseSpec("The request.", schemas.Inference)},
        errors=READ_CONTENT,
    ),
    Route(
        name="cancel_inference",
        method="DELETE",
        path="/v1/inference/{id}",
        handler=lambda to: to.requests.cancel,
        summary="Cancel a request.",
        parameters=(REQUEST,),
        answers={
            200: ResponseSpec("The request had already ended.", schemas.Inference),
            202: ResponseSpec("The request is being cancelled.", schemas.InferenceStatus),
        },
        errors=READ_CONTENT,
    ),
    Route(
        name="delete_inference_content",
        method="DELETE",
        path="/v1/inference/{id}/content",
        handler=lambda to: to.requests.remove,
        summary="Erase the content of a sealed request that has ended; its usage and charge stay.",
        parameters=(REQUEST,),
        answers={200: ResponseSpec("The content is erased.", schemas.Deleted)},
        errors=(*READ, "erase"),
    ),
    Route(
        name="stream_inference_events",
        method="GET",
        path="/v1/inference/{id}/events",
        handler=lambda to: to.requests.resume,
        summary="Resume a request's stream after an event.",
        parameters=(
            REQUEST,
            _query("after", "The id of the last event that the client has.", EVENT_ID, "17"),
            _header("Last-Event-ID", "The same, as browsers send it. It takes precedence.", EVENT_ID, "17"),
        ),
        answers={
            200: ResponseSpec("The events.", stream=NATIVE_STREAM),
            204: ResponseSpec("The client has the last event."),
        },
        errors=EVENTS,
    ),
    Route(
        name="get_response",
        method="GET",
        path="/v1/responses/{id}",
        handler=lambda to: to.responses.response,
        summary="Get a response so far, or replay its events.",
        parameters=(
            RESPONSE,
            _query("stream", "`true` for the events.", {"type": "string", "enum": ["true", "false"]}, "true"),
            _query("starting_after", "The number of the last event that the client has.", EVENT_ID, "17"),
        ),
        answers={
            200: ResponseSpec(
                "The response, or its events.", openai_schemas.Response, (openai_schemas.ResponseEvent,)
            )
        },
        errors=EVENTS,
    ),
    Route(
        name="delete_response",
        method="DELETE",
        path="/v1/responses/{id}",
        handler=lambda to: to.responses.remove,
        summary="Erase the content of a sealed response that has ended; its usage and charge stay.",
        parameters=(RESPONSE,),
        answers={200: ResponseSpec("The content is erased.", schemas.Deleted)},
        errors=(*READ, "erase"),
    ),
    Route(
        name="cancel_response",
        method="POST",
        path="/v1/responses/{id}/cancel",
        handler=lambda to: to.responses.cancel,
        summary="Cancel a response.",
        parameters=(RESPONSE,),
        answers={
            200: ResponseSpec("The response; it has ended if that took under 3 s.", openai_schemas.Response)
        },
        errors=READ_CONTENT,
    ),
    Route(
        name="list_models",
        method="GET",
        path="/v1/models",
        handler=lambda to: to.models.all,
        summary="List the served models.",
        parameters=(_query("all", "`true` for every known model.", {"type": "string"}, "true"),),
        answers={200: ResponseSpec("The models.", schemas.ModelList)},
        errors=("key",),
    ),
    Route(
        name="get_model",
        method="GET",
        path="/v1/models/{id}",
        handler=lambda to: to.models.one,
        summary="Get a model.",
        parameters=(_id("The model's name.", MODEL_NAME),),
        # A model's name may contain slashes.
        id_pattern=".+",
        answers={200: ResponseSpec("The model.", schemas.Model)},
        errors=("key", "model"),
    ),
    Route(
        name="list_invoices",
        method="GET",
        path="/v1/invoices",
        handler=lambda to: to.billing.invoices,
        summary="List the account's invoices, newest first.",
        parameters=(
            PAGE_SIZE,
            _query("after", "The month of the previous page's last invoice.", {"type": "string"}, "2026-11"),
        ),
        answers={200: ResponseSpec("One page.", schemas.InvoiceList)},
        errors=ASKED,
    ),
    Route(
        name="get_invoice",
        method="GET",
        path="/v1/invoices/{id}",
        handler=lambda to: to.billing.invoice,
        summary="Get the account's invoice of a month, `YYYY-MM`.",
        parameters=(_id("The month, `YYYY-MM`.", "2026-11"),),
        answers={200: ResponseSpec("The invoice.", schemas.MonthInvoice)},
        errors=ASKED,
    ),
    Route(
        name="get_usage",
        method="GET",
        path="/v1/usage",
        handler=lambda to: to.billing.usage,
        summary="Sum the account's usage.",
        parameters=(
            _query("from", "The first day (UTC).", DAY, "2026-11-01"),
            _query("to", "The last day (UTC), inclusive.", DAY, "2026-11-30"),
            _query(
                "group_by",
                "Columns, separated by commas: hour, day, model, key, plan. By default day and model. "
                "At most 10,000 rows.",
                {"type": "string"},
                "hour,model",
            ),
        ),
        answers={200: ResponseSpec("The sums.", schemas.UsageReport)},
        errors=ASKED,
    ),
    *(
        Route(
            name=name,
            method="GET",
            path=path,
            handler=lambda to: to.health.alive,
            summary="Check that the process runs.",
            answers={200: HEALTHY},
            errors=(),
            is_public=True,
        )
        for name, path in (("check_health", "/health"), ("check_liveness", "/livez"))
    ),
    Route(
        name="check_readiness",
        method="GET",
        path="/readyz",
        handler=lambda to: to.health.ready,
        summary="Check that the gateway accepts requests.",
        answers={200: HEALTHY},
        errors=("ready",),
        is_public=True,
    ),
    Route(
        name="get_version",
        method="GET",
        path="/version",
        handler=lambda to: to.health.version,
        summary="Get the version.",
        answers={200: ResponseSpec("The version.", schemas.Version)},
        errors=(),
        is_public=True,
    ),
    Route(
        name="get_openapi",
        method="GET",
        path="/openapi.json",
        handler=lambda to: to.health.openapi,
        summary="Get this document.",
        answers={200: ResponseSpec("The document.", dict[str, Any])},
        errors=(),
        is_public=True,
    ),
)
