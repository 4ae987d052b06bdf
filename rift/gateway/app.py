"""The ASGI app: routes, and one request's way through the gateway.

    authenticate → parse → admit → follow → append `RequestAccepted` → relay what the log says

Whatever is refused is refused before the append. From the append on, the log decides.
"""

import logging
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
from anyio.abc import TaskGroup

from events import codec, ids, subjects
from events.book import Book
from events.fleet import Fleet
from events.log import Log, LogError, LogFull, OutcomeUnknown, append_until_known
from events.schema import CancelReason, CancelRequested, KeyIssued, Price, Problem, RequestAccepted
from events.subjects import Address
from rift import __version__, catalogue
from rift.catalogue import Catalogue
from rift.gateway import openai, parse, transcript
from rift.gateway.answer import Answer
from rift.gateway.http import ClientGone, Receive, Refusal, Request, Scope, Send
from rift.gateway.native import NativeStream
from rift.gateway.parse import Wanted
from rift.gateway.relay import Format, Relay, Stream

logger = logging.getLogger(__name__)

# Until then a worker's refusal can still be a status code of its own.
STATUS_LINE_S = 1.0

# Proxies close what is silent for 30 s or more.
KEEP_ALIVE_S = 12.0

# A client that waits for its acceptance waits this long for the broker; a restart takes a second or two.
ACCEPT_S = 10.0

# Who was told that a request was not accepted must not be charged: that is said for this long.
CANCEL_S = 300.0

# Queue and answer together. Nobody waits longer for an answer that is not in the background.
DEADLINE_MS = 600_000

STOPPING = Problem(
    code="gateway_stopping", message="this gateway stops; fetch the answer by its id from another"
)
SSE_HEADERS = [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]

Handler = Callable[[Request, re.Match[str]], Awaitable[None]]


class Gateway:
    """One process's gateway on one lane. `tasks` outlives each request: it says what must still be said."""

    def __init__(
        self,
        log: Log,
        relay: Relay,
        *,
        book: Book,
        fleet: Fleet,
        models: Catalogue,
        default_model: str,
        secret: bytes,
        lane: tuple[int, str],
        entropy: Callable[[int], bytes],
        tasks: TaskGroup,
    ) -> None:
        self._log, self._relay, self._book, self._fleet = log, relay, book, fleet
        self._models, self._default_model = models, default_model
        self._secret, self._entropy, self._tasks = secret, entropy, tasks
        self._shard, self._lane = lane
        self._routes: list[tuple[str, re.Pattern[str], Handler]] = [
            ("POST", re.compile("/v1/inference"), partial(self._infer, parse.native)),
            ("POST", re.compile("/v1/completions"), partial(self._infer, parse.completion)),
            ("POST", re.compile("/v1/chat/completions"), partial(self._infer, parse.chat)),
            ("GET", re.compile("/v1/inference/([^/]+)"), self._retrieve),
            ("GET", re.compile("/v1/models"), self._list_models),
            ("GET", re.compile("/v1/models/(.+)"), self._show_model),
            ("GET", re.compile("/health|/livez"), self._alive),
            ("GET", re.compile("/readyz"), self._ready),
            ("GET", re.compile("/version"), self._version),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope, receive, send)
        try:
            await self._route(request)
        except ClientGone:
            return
        except Refusal as refusal:
            await request.drain()
            await request.answer(refusal.status, refusal.body(), refusal.headers)

    async def _route(self, request: Request) -> None:
        allowed = []
        for method, pattern, handler in self._routes:
            if match := pattern.fullmatch(request.path):
                if method == request.method:
                    await handler(request, match)
                    return
                allowed.append(method)
        if allowed:
            allow = ", ".join(sorted(set(allowed)))
            raise Refusal(
                405,
                f"{request.path} takes {allow}, not {request.method}",
                code="method_not_allowed",
                headers=[(b"allow", allow.encode())],
            )
        raise Refusal(404, f"there is no {request.path} here", code="not_found")

    # --- who, what, may it ---------------------------------------------------------------------------

    def _authenticate(self, request: Request) -> KeyIssued:
        scheme, _, key = (request.header(b"authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Refusal(
                401,
                "no API key: send the header `Authorization: Bearer rift_…`",
                code="missing_api_key",
                headers=[(b"www-authenticate", b"Bearer")],
            )
        issued = self._book.authenticate(key.strip())
        if issued is None:
            raise Refusal(
                401,
                "this API key is not valid here",
                code="invalid_api_key",
                headers=[(b"www-authenticate", b"Bearer")],
            )
        return issued

    def _admit(self, wanted: Wanted) -> Price:
        """Refuse what cannot be served; return the price in force."""
        model = self._models.get(wanted.model)
        price = self._book.price(wanted.model)
        if model is None or price is None:
            known = ", ".join(name for name in self._models if self._book.price(name))
            raise Refusal(
                404,
                f"model {wanted.model!r} is not known here; known: {known}",
                code="model_not_found",
                param="model",
            )
        if not self._fleet.can_serve(wanted.model):
            raise Refusal(
                503,
                f"nothing serves {wanted.model} now; start it with `rift worker --model {wanted.model}`",
                code="model_unavailable",
                param="model",
                headers=[(b"retry-after", b"30")],
            )
        limit = wanted.parameters.max_tokens
        if limit is not None and limit > model.context_tokens:
            param = "parameters.max_tokens" if wanted.kind == "inference" else "max_tokens"
            raise Refusal(
                400,
                f"{param} is {limit}; the context of {wanted.model} is {model.context_tokens} tokens",
                code="max_tokens_too_large",
                param=param,
            )
        return price

    async def _accept(self, stream: Stream) -> None:
        """Append the acceptance. Raises Refusal: then the request was not accepted, and costs nothing."""
        accepted = stream.answer.accepted
        at = self._at(accepted.model)
        data = codec.encode(self._lane, [accepted])
        self._relay.open(accepted, stream)
        try:
            await append_until_known(
                self._log, subjects.shard_stream(at.shard), subjects.request(at), data, within_s=ACCEPT_S
            )
            return
        except OutcomeUnknown:
            self._tasks.start_soon(self._cancel, accepted, "unanswered")
            refusal = Refusal(
                503, "the log does not answer; try again", code="log_unavailable", headers=_retry(5)
            )
        except LogFull:
            refusal = Refusal(503, "the log is full; try again later", code="log_full", headers=_retry(60))
        except LogError as error:
            refusal = Refusal(413, f"the request cannot be stored: {error}", code="body_too_large")
        self._relay.close(stream)
        raise refusal

    def _at(self, model: str) -> Address:
        return Address(self._shard, self._lane, catalogue.slug(model))

    def _accepted(self, wanted: Wanted, issued: KeyIssued) -> RequestAccepted:
        request = ids.new_request_id(
            secret=self._secret,
            account=issued.account,
            at=self._at(wanted.model),
            floor=self._relay.position,
            entropy=self._entropy(ids.RANDOM_BYTES),
        )
        context = self._models[wanted.model].context_tokens
        return RequestAccepted(
            request=request,
            account=issued.account,
            key=issued.key,
            model=wanted.model,
            kind=wanted.kind,
            input=wanted.input,
            parameters=wanted.parameters,
            stream=wanted.stream,
            prompt_tokens_max=min(context, wanted.prompt_tokens_max or context),
            deadline_ms=DEADLINE_MS,
            price_version=self._book.price_version,
            book=self._book.position,
        )

    # --- inference -----------------------------------------------------------------------------------

    async def _infer(
        self,
        read: Callable[[bytes], Wanted],
        request: Request,
        match: re.Match[str],
    ) -> None:
        issued = self._authenticate(request)
        content_type = (request.header(b"content-type") or "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            raise Refusal(
                415, "send the body with `Content-Type: application/json`", code="unsupported_media_type"
            )
        wanted = read(await request.body())
        price = self._admit(wanted)
        answer = Answer(self._accepted(wanted, issued), price, keep_text=not wanted.stream)
        stream = Stream(answer, _format(answer, wanted) if wanted.stream else None)
        await self._accept(stream)
        refusal: Refusal | None = None
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch, request, tasks.cancel_scope)
                refusal = await (self._stream if stream.format else self._wait)(request, stream)
                tasks.cancel_scope.cancel()
        finally:
            self._relay.close(stream)
            if not stream.ended:
                self._tasks.start_soon(self._cancel, answer.accepted, "disconnect")
        if refusal is not None:
            raise refusal

    async def _watch(self, request: Request, scope: anyio.CancelScope) -> None:
        await request.disconnected()
        scope.cancel()

    async def _wait(self, request: Request, stream: Stream) -> Refusal | None:
        """Answer with the whole object once the request has ended; return a failure instead."""
        while not stream.ended:
            await stream.wait()
        answer = stream.answer
        if answer.life.phase != "ended":
            return Refusal(503, STOPPING.message, code=STOPPING.code, headers=_retry(1))
        if failure := answer.failure():
            return _failed(*failure)
        native = answer.accepted.kind == "inference"
        await request.answer(200, answer.inference(output=True) if native else openai.completion(answer))
        return None

    async def _stream(self, request: Request, stream: Stream) -> Refusal | None:
        """Send frames as the log brings them; return a failure that comes before the first."""
        assert stream.format is not None, "a stream has a format"
        with anyio.move_on_after(STATUS_LINE_S):
            await stream.moved.wait()
        if stream.ended and (failure := stream.answer.failure()):
            return _failed(*failure)
        await request.start(200, b"text/event-stream", SSE_HEADERS)
        if not stream.moved.is_set():
            model = stream.answer.accepted.model
            waits_for = "queued" if self._fleet.is_ready(model) else "starting"
            await request.write(stream.format.waiting(waits_for), more=True)
        while True:
            with anyio.move_on_after(KEEP_ALIVE_S) as silence:
                await stream.wait()
            data = stream.format.keep_alive if silence.cancelled_caught else stream.take()
            self._relay.taken(stream)
            await request.write(data, more=not stream.ended)
            if stream.ended:
                return None

    async def _cancel(self, accepted: RequestAccepted, why: CancelReason) -> None:
        at = self._at(accepted.model)
        data = codec.encode(self._lane, [CancelRequested(request=accepted.request, why=why)])
        try:
            await append_until_known(
                self._log, subjects.shard_stream(at.shard), subjects.cancel(at), data, within_s=CANCEL_S
            )
        except LogError as error:
            logger.error("%s: the cancel (%s) could not be stored: %s", accepted.request, why, error)

    async def _retrieve(self, request: Request, match: re.Match[str]) -> None:
        issued = self._authenticate(request)
        unknown = Refusal(404, f"there is no request {match[1]!r} here", code="request_not_found", param="id")
        parsed = ids.verified(match[1], secret=self._secret, account=issued.account)
        if parsed is None:
            raise unknown
        try:
            answer = await transcript.read(self._log, parsed, self._book)
        except LogError as error:
            raise Refusal(
                503, f"the log does not answer: {error}", code="log_unavailable", headers=_retry(5)
            ) from error
        if answer is None:
            raise unknown
        shown = answer.inference(output=True) | {"status": answer.status}
        if failure := answer.failure():
            shown["error"] = _failed(*failure).body()["error"]
        await request.answer(200, shown)

    # --- the rest ------------------------------------------------------------------------------------

    async def _list_models(self, request: Request, match: re.Match[str]) -> None:
        self._authenticate(request)
        whole = request.query().get("all") == "true"
        names = [name for name in self._models if whole or self._fleet.can_serve(name)]
        await request.answer(200, {"object": "list", "data": [self._model(name) for name in names]})

    async def _show_model(self, request: Request, match: re.Match[str]) -> None:
        self._authenticate(request)
        if match[1] not in self._models:
            raise Refusal(404, f"model {match[1]!r} is not known here", code="model_not_found", param="model")
        await request.answer(200, self._model(match[1]))

    def _model(self, name: str) -> dict[str, Any]:
        model, price = self._models[name], self._book.price(name)
        shown = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "rift",
            "title": model.title,
            "context_tokens": model.context_tokens,
            "max_model_len": model.context_tokens,
            "default": name == self._default_model,
            "ready": self._fleet.is_ready(name),
        }
        if price is not None:
            shown["price_nanousd"] = {
                "prompt_token": price.prompt_nanousd,
                "output_token": price.output_nanousd,
            }
        return shown

    async def _alive(self, request: Request, match: re.Match[str]) -> None:
        await request.answer(200, {"status": "ok"})

    async def _ready(self, request: Request, match: re.Match[str]) -> None:
        """Ready to accept: the log answers. Whether a model's replica runs is another question."""
        if not self._log.is_connected:
            raise Refusal(503, "the log does not answer", code="log_unavailable", headers=_retry(1))
        await request.answer(
            200, {"status": "ready", "models_ready": [m for m in self._models if self._fleet.is_ready(m)]}
        )

    async def _version(self, request: Request, match: re.Match[str]) -> None:
        await request.answer(200, {"version": __version__})


def _format(answer: Answer, wanted: Wanted) -> Format:
    if wanted.kind == "inference":
        return NativeStream(answer)
    return openai.OpenAIStream(answer, include_usage=wanted.include_usage)


def _failed(status: int, problem: Problem) -> Refusal:
    return Refusal(status, problem.message, code=problem.code, param=problem.param)


def _retry(seconds: int) -> list[tuple[bytes, bytes]]:
    return [(b"retry-after", str(seconds).encode()), (b"retry-after-ms", str(seconds * 1000).encode())]
