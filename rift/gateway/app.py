"""The ASGI app: its routes, what each answer says of itself, and health."""

import contextlib
import logging
import re
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec

from events import ids
from events.log import LogError
from rift import __version__
from rift.gateway.admission.admission import Admission
from rift.gateway.api import openapi
from rift.gateway.api.billing import BillingRoutes
from rift.gateway.api.models import ModelRoutes
from rift.gateway.api.requests import RequestRoutes
from rift.gateway.asgi import cors
from rift.gateway.asgi.errors import ClientGone, HTTPError, retry_after
from rift.gateway.asgi.request import Receive, Request, Scope, Send
from rift.gateway.asgi.static_files import StaticFiles
from rift.gateway.dialects import dialect as dialects
from rift.gateway.state import GatewayConfig, LogState
from rift.gateway.streams.delivery import Delivery
from rift.gateway.streams.lane_registry import LaneRegistry
from rift.gateway.submission.acceptance import AcceptanceBuilder
from rift.gateway.submission.acceptance_writer import AcceptanceWriter
from rift.gateway.submission.idempotency import IdempotencyKeys
from rift.gateway.submission.responder import Responder
from rift.gateway.submission.submit import Submission

logger = logging.getLogger(__name__)

Handler = Callable[[Request, re.Match[str]], Awaitable[None]]


class Gateway:
    """One process's gateway on one lane."""

    def __init__(
        self,
        state: LogState,
        config: GatewayConfig,
        relays: LaneRegistry,
        admission: Admission,
        delivery: Delivery,
    ) -> None:
        self._log = state.log
        self._admission = admission
        self._delivery = delivery
        self._fleet = state.fleet
        self._models = config.models
        self._entropy = config.entropy
        self._pages = StaticFiles()
        self._document = msgspec.Raw(msgspec.json.encode(openapi.document()))
        submission = Submission(
            admission,
            IdempotencyKeys(state, config.secret),
            AcceptanceBuilder(state.book, config, relays.own),
            AcceptanceWriter(state, config, delivery.cancellation),
            Responder(state.book, relays, delivery),
        )
        there = RequestRoutes(
            state.log,
            relays,
            state.histories,
            admission.auth,
            delivery,
            book=state.book,
            secret=config.secret,
        )
        listing = ModelRoutes(config.models, admission=admission, book=state.book, fleet=state.fleet)
        billing = BillingRoutes(state.log, admission.auth, secret=config.secret)
        self._routes: list[tuple[str, re.Pattern[str], Handler]] = [
            ("POST", re.compile("/v1/inference"), partial(submission.infer, dialects.NATIVE)),
            ("POST", re.compile("/v1/completions"), partial(submission.infer, dialects.COMPLETIONS)),
            ("POST", re.compile("/v1/chat/completions"), partial(submission.infer, dialects.CHAT)),
            ("POST", re.compile("/v1/responses"), partial(submission.infer, dialects.RESPONSES)),
            ("GET", re.compile("/v1/inference"), billing.requests),
            ("GET", re.compile("/v1/inference/([^/]+)"), there.inference),
            ("DELETE", re.compile("/v1/inference/([^/]+)"), there.cancel),
            ("DELETE", re.compile("/v1/inference/([^/]+)/content"), there.remove),
            ("GET", re.compile("/v1/inference/([^/]+)/events"), there.resume),
            ("GET", re.compile("/v1/responses/([^/]+)"), there.response),
            ("DELETE", re.compile("/v1/responses/([^/]+)"), there.remove_response),
            ("POST", re.compile("/v1/responses/([^/]+)/cancel"), there.cancel_response),
            ("GET", re.compile("/v1/models"), listing.all),
            ("GET", re.compile("/v1/models/(.+)"), listing.one),
            ("GET", re.compile("/v1/invoices/([^/]+)"), billing.invoice),
            ("GET", re.compile("/v1/usage"), billing.usage),
            ("GET", re.compile("/health|/livez"), self._alive),
            ("GET", re.compile("/readyz"), self._ready),
            ("GET", re.compile("/version"), self._version),
            ("GET", re.compile(r"/openapi\.json"), self._describe),
        ]

    def stop(self) -> None:
        """Accept nothing more, and cancel nothing for clients that go."""
        self._admission.stop()
        self._delivery.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        if scope["type"] != "http":
            return
        request = Request(scope, receive, send)
        request.own_id = self._entropy(ids.RANDOM_BYTES).hex()
        try:
            try:
                await self._route(request)
            except LogError as error:
                logger.warning("%s %s: %s", request.method, request.path, error)
                message = "the log does not answer; try again"
                raise HTTPError(503, message, code="log_unavailable", headers=retry_after(2)) from error
        except ClientGone:
            return
        except HTTPError as refusal:
            with contextlib.suppress(ClientGone):
                await request.drain()
                await request.answer(refusal.status, refusal.body(), refusal.headers)

    async def _route(self, request: Request) -> None:
        if request.path in self._pages:
            return await self._pages.answer(request)
        if cors.is_open(request.path):
            if cors.is_preflight(request):
                return await cors.answer_preflight(request)
            request.always = cors.ALWAYS
        allowed = []
        for method, pattern, handler in self._routes:
            if match := pattern.fullmatch(request.path):
                if method == request.method or (method, request.method) == ("GET", "HEAD"):
                    await handler(request, match)
                    return
                allowed.append(method)
        if allowed:
            allow = ", ".join(sorted(set(allowed)))
            message = f"{request.path} takes {allow}, not {request.method}"
            headers = [(b"allow", allow.encode())]
            raise HTTPError(405, message, code="method_not_allowed", headers=headers)
        raise HTTPError(404, f"there is no {request.path} here", code="not_found")

    # --- health ----------------------------------------------------------------------------------------

    async def _alive(self, request: Request, match: re.Match[str]) -> None:
        await request.answer(200, {"status": "ok"})

    async def _ready(self, request: Request, match: re.Match[str]) -> None:
        """Ready to accept: the log answers. Whether a model's replica runs is another question."""
        if not self._log.is_connected:
            message = "the log does not answer"
            raise HTTPError(503, message, code="log_unavailable", headers=retry_after(1))
        self._admission.auth.check_book()
        ready = [name for name in self._models if self._fleet.is_ready(name)]
        await request.answer(200, {"status": "ready", "models_ready": ready})

    async def _describe(self, request: Request, match: re.Match[str]) -> None:
        await request.answer(200, self._document)

    async def _version(self, request: Request, match: re.Match[str]) -> None:
        await request.answer(200, {"version": __version__})
