"""The native API: its body, its object and its stream.

A frame has `id`, `event` and `data`. The id is the number of the request's events that counted so far: it
names a point in the log, reveals nothing about other traffic, and is the same from every gateway, live or
replayed.
"""

from typing import Annotated, Any

import msgspec

from events.contracts import BODY_BYTES_MAX
from events.schema import AttemptStarted, Problem, TokensGenerated
from rift.catalogue import NATIVE_PROMPT_TOKENS_MAX, PROMPT_BYTES_PER_TOKEN_MAX
from rift.gateway.asgi.errors import HTTPError, error_body
from rift.gateway.completion import Completion
from rift.gateway.dialects.sampling import (
    STORE,
    Body,
    ParsedRequest,
    Sampling,
    Text,
    decode,
    note,
    parameters,
)

PROMPT = (
    f"The text, of up to {NATIVE_PROMPT_TOKENS_MAX:,} tokens (the default of the setting "
    "`native_prompt_tokens_max`) and at most the model's context. The OpenAI routes accept the whole context."
)

KEEP_ALIVE = b": keep-alive\n\n"

# How long a browser waits before it resumes, in milliseconds. It is part of the first event: some clients
# fail on an event without data.
RETRY = b"retry: 500\n"

_encode = msgspec.json.Encoder().encode


class NativeParameters(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    raw: Annotated[
        bool | None, note("If true, the prompt is not written into the model's chat template.")
    ] = None


class NativeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: Annotated[str, note("A model of `GET /v1/models`.", "smollm2:135m")]
    prompt: Annotated[Text, msgspec.Meta(description=PROMPT)]
    parameters: Annotated[NativeParameters | None, note("How to sample the answer.")] = None
    stream: Annotated[
        bool | None, note("If true, server-sent events. A client that lost them resumes within 15 s.")
    ] = None
    background: Annotated[
        bool | None, note("If true, the answer is 202 at once, and the request runs without a client.")
    ] = None
    store: Annotated[bool | None, note(STORE)] = None


_body = msgspec.json.Decoder(NativeBody)


def body_bytes_max(prompt_tokens_max: int) -> int:
    """Return the most bytes of a body whose prompt has up to so many tokens.

    Each may be as long as the longest of a model that does not say it. Text with an escape for nearly every
    character may not fit.
    """
    return min(BODY_BYTES_MAX, prompt_tokens_max * PROMPT_BYTES_PER_TOKEN_MAX)


def parse(data: Body, prompt_tokens_max: int = NATIVE_PROMPT_TOKENS_MAX) -> ParsedRequest:
    """Raises HTTPError."""
    try:
        body = decode(data, _body)
    except HTTPError as error:
        if error.param not in NativeParameters.__struct_fields__:
            raise
        message = f"{error.message}; write it in `parameters`"
        raise HTTPError(error.status, message, code=error.code, param=error.param) from error
    if body.background and body.stream:
        message = (
            "background: a background request cannot stream; set `stream` to false and read its events "
            "at /v1/inference/{id}/events"
        )
        raise HTTPError(400, message, code="invalid_value", param="background")
    sampling = body.parameters or NativeParameters()
    return ParsedRequest(
        kind="inference",
        model=body.model,
        input=body.prompt,
        parameters=parameters(sampling, sampling.max_tokens, raw=bool(sampling.raw), at="parameters."),
        stream=bool(body.stream),
        background=bool(body.background),
        store=body.store is not False,
        prompt_tokens_max=prompt_tokens_max,
        max_tokens_param="parameters.max_tokens",
    )


def inference(answer: Completion, *, with_output: bool = True) -> dict[str, Any]:
    """Return the native object. The last frame of a stream has it without the output."""
    shown: dict[str, Any] = {
        "id": answer.id,
        "object": "inference",
        "model": answer.accepted.model,
        "created": answer.created,
    }
    if with_output:
        shown["output"] = answer.text
        if answer.reasoning:
            shown["reasoning"] = answer.reasoning
    prompt = answer.life.prompt_tokens
    output = answer.life.next_index
    shown |= {
        "finish_reason": answer.life.reason,
        "attempts": answer.life.attempts,
        "usage": {"prompt_tokens": prompt, "output_tokens": output, "total_tokens": prompt + output},
        "charge": answer.charge(),
        "timing": answer.timing(),
    }
    if answer.accepted.plan == "per_second":
        shown["seconds"] = answer.seconds
    if answer.simulated:
        shown["simulated"] = True
    return shown


def stored_inference(answer: Completion) -> dict[str, Any]:
    """Return the native object of a stored request: also its status, its metadata and its failure."""
    shown = inference(answer) | {"status": answer.status}
    if answer.accepted.metadata:
        shown["metadata"] = answer.accepted.metadata
    if failure := answer.failure():
        shown |= error_body(*failure)
    return shown


def status(answer: Completion, name: str) -> dict[str, Any]:
    return {"id": answer.id, "object": "inference", "status": name}


class NativeStream:
    keep_alive = KEEP_ALIVE
    tells_status = True

    def __init__(self, answer: Completion) -> None:
        self._answer = answer
        self._id = _encode(answer.id)
        self._first = True

    def waiting(self, name: str, estimate_ms: int | None) -> bytes:
        estimate = {} if estimate_ms is None else {"estimate_ms": estimate_ms}
        return self._frame(b"status", _encode({"id": self._answer.id, "status": name, **estimate}))

    def event(self, event: Any, answer: Completion) -> bytes:
        if isinstance(event, TokensGenerated):
            data = b'{"id":%b,"index":%d,"delta":%b' % (self._id, event.index, _encode(event.text))
            if event.reasoning:
                data += b',"reasoning":' + _encode(event.reasoning)
            return self._frame(b"token", data + b"}")
        if failure := answer.failure():
            return self._frame(b"error", _encode({"id": answer.id, **error_body(*failure)}))
        if answer.life.phase == "ended":
            return self._frame(b"done", _encode(inference(answer, with_output=False)))
        if isinstance(event, AttemptStarted):
            data = _encode({"id": answer.id, "status": "running", "attempt": answer.life.attempts})
            return self._frame(b"status", data)
        return b""

    def broken_off(self, problem: Problem, after: int) -> bytes:
        """The request has not ended: `resume` is the path of the rest of the stream."""
        resume = f"/v1/inference/{self._answer.id}/events?after={after}"
        shown = {"id": self._answer.id, "resume": resume, **error_body(503, problem)}
        return self._frame(b"error", _encode(shown), after)

    def _frame(self, kind: bytes, data: bytes, at: int | None = None) -> bytes:
        counted = self._answer.life.counted if at is None else at
        frame = b"id: %d\nevent: %b\ndata: %b\n\n" % (counted, kind, data)
        if self._first:
            self._first = False
            return RETRY + frame
        return frame
