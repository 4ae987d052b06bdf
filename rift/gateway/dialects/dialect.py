"""The four APIs side by side. Every difference between them is a field of `Dialect`, so no other module
branches on the API of a request."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol

import msgspec

from events.contracts import BODY_BYTES_MAX
from events.schema import Kind, Problem
from rift.catalogue import NATIVE_PROMPT_TOKENS_MAX
from rift.gateway.completion import Completion
from rift.gateway.dialects import (
    chat_request,
    chat_response,
    completions_request,
    native,
    openai_errors,
    responses_request,
    responses_response,
)
from rift.gateway.dialects.sampling import Body, ParsedRequest


class StreamFormat(Protocol):
    """Turns one client's events into frames. Its state is what the client has been sent."""

    # The bytes that keep a silent connection open.
    keep_alive: bytes
    # Whether the stream shows why a request waits.
    tells_status: bool

    def waiting(self, name: str, estimate_ms: int | None) -> bytes:
        """Return the frame for a request that waits: `queued`, or `starting` with an estimate."""
        ...

    def event(self, event: Any, answer: Completion) -> bytes:
        """Return the frames of an event that `answer` has just taken."""
        ...

    def broken_off(self, problem: Problem, after: int) -> bytes:
        """Return the last frame of a stream that ends before its request, after event `after`."""
        ...


async def _encode_nothing(answer: Completion) -> None:
    """Leave everything to `whole`."""


class Dialect(msgspec.Struct, frozen=True, kw_only=True):
    """How one API reads requests and shows answers."""

    # The stored name of the API.
    kind: Kind
    # The documented type of a request's body.
    body: type[msgspec.Struct]
    # A body's bytes to a request. Raises HTTPError.
    parse: Callable[[Body], ParsedRequest]
    # The most bytes of a body.
    body_bytes_max: int = BODY_BYTES_MAX
    stream: Callable[[Sequence[Completion], ParsedRequest], StreamFormat]
    # All choices, in the order of their ends, to the API's object.
    whole: Callable[[Sequence[Completion]], dict[str, Any]]
    # Encode much of what `whole` will show of an answer, while other tasks run.
    encode: Callable[[Completion], Awaitable[None]] = _encode_nothing
    # Status and object of an accepted background request; None if the API has none.
    background: Callable[[Completion], tuple[int, dict[str, Any]]] | None = None
    # A request's problem as this API names it.
    translate: Callable[[Problem], Problem] = lambda problem: problem
    # An id as this API's clients write it to the id of the request.
    request_id: Callable[[str], str] = str
    # Whether the worker writes the prompt into the model's chat template.
    has_template: bool = True
    # Whether a client that lost its stream may resume it, so that its request waits for it.
    is_resumable: bool = False
    # Whether a stream's frames need all of the text before them.
    streams_text: bool = False


NATIVE = Dialect(
    kind="inference",
    body=native.NativeBody,
    parse=native.parse,
    body_bytes_max=native.body_bytes_max(NATIVE_PROMPT_TOKENS_MAX),
    stream=lambda answers, parsed: native.NativeStream(answers[0]),
    whole=lambda answers: native.inference(answers[0]),
    background=lambda answer: (202, native.status(answer, answer.status)),
    is_resumable=True,
)
COMPLETIONS = Dialect(
    kind="completion",
    body=completions_request.CompletionBody,
    parse=completions_request.parse_completion,
    stream=partial(chat_response.stream, chat_response.TextLayout()),
    whole=partial(chat_response.whole, chat_response.TextLayout()),
    translate=partial(openai_errors.translate, params=chat_response.TextLayout.params),
    has_template=False,
)
CHAT = Dialect(
    kind="chat",
    body=chat_request.ChatBody,
    parse=chat_request.parse_chat,
    stream=partial(chat_response.stream, chat_response.ChatLayout()),
    whole=partial(chat_response.whole, chat_response.ChatLayout()),
    translate=partial(openai_errors.translate, params=chat_response.ChatLayout.params),
)
RESPONSES = Dialect(
    kind="response",
    body=responses_request.ResponseBody,
    parse=responses_request.parse,
    stream=lambda answers, parsed: responses_response.ResponsesStream(answers[0]),
    whole=lambda answers: responses_response.response(answers[0]),
    encode=responses_response.encode_logprobs,
    background=lambda answer: (200, responses_response.response(answer)),
    translate=partial(openai_errors.translate, params=responses_response.PARAMS),
    request_id=responses_response.request_id,
    # The last event holds the whole response.
    streams_text=True,
)

_BY_KIND: dict[str, Dialect] = {each.kind: each for each in (NATIVE, COMPLETIONS, CHAT, RESPONSES)}


def native_dialect(prompt_tokens_max: int) -> Dialect:
    """Return the native dialect of an installation that sets this limit."""
    return msgspec.structs.replace(
        NATIVE,
        parse=partial(native.parse, prompt_tokens_max=prompt_tokens_max),
        body_bytes_max=native.body_bytes_max(prompt_tokens_max),
    )


def of(kind: Kind) -> Dialect:
    """Return the dialect of a stored request."""
    return _BY_KIND[kind]
