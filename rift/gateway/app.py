"""The ASGI app: routes, and one request's way through the gateway.

    authenticate → parse → admit → reserve → follow → append `RequestAccepted` → relay what the log says

Whatever is refused is refused before the append. From the append on, the log decides.
"""

import contextlib
import logging
import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from events import codec, ids, subjects
from events.book import Book
from events.fleet import Fleet
from events.history import Histories
from events.ids import RequestId, parse_request_id
from events.log import Log, LogError, LogFull, OutcomeUnknown, RecordTooLarge, append_until_known
from events.schema import KeyIssued, RequestAccepted
from events.subjects import Address
from rift import __version__, catalogue
from rift.catalogue import Catalogue
from rift.gateway import idempotency, openai, parse
from rift.gateway.admission import Admission, retry_after
from rift.gateway.allowances import Allowances
from rift.gateway.answer import Answer
from rift.gateway.billing import Billing
from rift.gateway.delivery import Delivery, failed
from rift.gateway.http import ClientGone, Headers, Receive, Refusal, Request, Scope, Send
from rift.gateway.idempotency import Claim, Entry
from rift.gateway.models import Models
from rift.gateway.native import NativeStream, event_id
from rift.gateway.parse import Wanted
from rift.gateway.relay import Format, Stream
from rift.gateway.relays import Relays

logger = logging.getLogger(__name__)

# A client that waits for its acceptance waits this long for the broker; a restart takes a second or two.
ACCEPT_S = 10.0

# Queue, a start of the model and answer together; nobody waits longer for an answer. The slowest start that
# is known takes 150 s, which leaves 7 minutes; three that fail end a request sooner.
DEADLINE_MS = 600_000

REPLAYED = [(b"idempotent-replayed", b"true")]

Handler = Callable[[Request, re.Match[str]], Awaitable[None]]


class Gateway:
    """One process's gateway on one lane."""

    def __init__(
        self,
        log: Log,
        relays: Relays,
        histories: Histories,
        admission: Admission,
        delivery: Delivery,
        allowances: Allowances,
        *,
        book: Book,
        fleet: Fleet,
        models: Catalogue,
        secret: bytes,
        lane: tuple[int, str],
        entropy: Callable[[int], bytes],
    ) -> None:
        self._log, self._relays, self._histories = log, relays, histories
        self._admission, self._delivery, self._allowances = admission, delivery, allowances
        self._book, self._fleet = book, fleet
        self._models = models
        self._secret, self._entropy = secret, entropy
        self._shard, self._lane = lane
        listing = Models(models, admission=admission, book=book, fleet=fleet)
        billing = Billing(log, admission)
        self._routes: list[tuple[str, re.Pattern[str], Handler]] = [
            ("POST", re.compile("/v1/inference"), partial(self._infer, parse.native)),
            ("POST", re.compile("/v1/completions"), partial(self._infer, parse.completion)),
            ("POST", re.compile("/v1/chat/completions"), partial(self._infer, parse.chat)),
            ("GET", re.compile("/v1/inference/([^/]+)"), self._retrieve),
            ("DELETE", re.compile("/v1/inference/([^/]+)"), self._cancel),
            ("GET", re.compile("/v1/inference/([^/]+)/events"), self._resume),
            ("GET", re.compile("/v1/models"), listing.all),
            ("GET", re.compile("/v1/models/(.+)"), listing.one),
            ("GET", re.compile("/v1/invoices/([^/]+)"), billing.invoice),
            ("GET", re.compile("/v1/usage"), billing.usage),
            ("GET", re.compile("/health|/livez"), self._alive),
            ("GET", re.compile("/readyz"), self._ready),
            ("GET", re.compile("/version"), self._version),
        ]

    def stop(self) -> None:
        """Accept nothing more; who leaves now leaves because of us."""
        self._admission.stopping = self._delivery.stopping = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        if scope["type"] != "http":
            return
        request = Request(scope, receive, send)
        try:
            try:
                await self._route(request)
            except LogError as error:
                logger.warning("%s %s: %s", request.method, request.path, error)
                message = "the log does not answer; try again"
                raise Refusal(503, message, code="log_unavailable", headers=retry_after(2)) from error
        except ClientGone:
            return
        except Refusal as refusal:
            with contextlib.suppress(ClientGone):
                await request.drain()
                await request.answer(refusal.status, refusal.body(), refusal.headers)

    async def _route(self, request: Request) -> None:
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
            raise Refusal(405, message, code="method_not_allowed", headers=headers)
        raise Refusal(404, f"there is no {request.path} here", code="not_found")

    # --- a new request -------------------------------------------------------------------------------

    async def _infer(self, read: Callable[[bytes], Wanted], request: Request, match: re.Match[str]) -> None:
        issued = self._admission.authenticate(request)
        content_type = (request.header(b"content-type") or "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            message = "send the body with `Content-Type: application/json`"
            raise Refusal(415, message, code="unsupported_media_type")
        body = await request.body()
        wanted = read(body)
        key = request.header(b"idempotency-key")
        if key is None:
            accepted = self._accepted(wanted, issued, self._entry(wanted, issued))
            await self._answer_new(request, wanted, await self._cover(wanted, accepted))
            return
        digest = idempotency.key_digest(self._secret, issued.account, key)
        entry = self._entry(wanted, issued, body=idempotency.body_digest(request.path, body))
        ours = self._accepted(wanted, issued, entry, digest=digest)
        claim, accepted = await self._claim(digest, entry, wanted, ours)
        if claim.is_new:
            await self._answer_new(request, wanted, accepted)
        else:
            headers = REPLAYED if claim.entry.nonce != entry.nonce else ()
            accepted = self._accepted(wanted, issued, claim.entry, digest=digest)
            await self._answer_again(request, wanted, accepted, headers)

    async def _cover(self, wanted: Wanted, accepted: RequestAccepted) -> RequestAccepted:
        self._admission.admit(wanted, accepted.account)
        return await self._allowances.cover(accepted)

    async def _claim(
        self, digest: str, entry: Entry, wanted: Wanted, accepted: RequestAccepted
    ) -> tuple[Claim, RequestAccepted]:
        """Return the claim in force, and with a new one the acceptance with its allowance: who has claimed
        must not wait. A key whose request failed by our fault is taken again."""
        found = await idempotency.find(self._log, digest, entry)
        if found is not None and not await self._failed_by_us(found):
            return found, accepted
        accepted, is_new = await self._cover(wanted, accepted), False
        try:
            last = found.sequence if found else 0
            claim = await idempotency.claim(self._log, digest, entry, replaces=last)
            is_new = claim.is_new
            return claim, accepted
        finally:
            if not is_new:
                self._allowances.free(accepted)

    async def _answer_new(self, request: Request, wanted: Wanted, accepted: RequestAccepted) -> None:
        stream = self._open(wanted, accepted)
        await self._append(stream)
        await self._answer_with(request, wanted, stream)

    async def _answer_again(
        self, request: Request, wanted: Wanted, accepted: RequestAccepted, headers: Headers
    ) -> None:
        """Attach to the request that an idempotency key stands for, from its first event."""
        parsed = _parsed(accepted.request)
        relay = await self._relays.of(parsed.at.shard, parsed.at.lane)
        make = partial(self._open, wanted)
        stream = await relay.attach(parsed, make)
        if stream is None:
            # The gateway that claimed the key died before it accepted, or the log was trimmed.
            await idempotency.check_kept(self._log, parsed)
            accepted = await self._cover(wanted, accepted)
            try:
                await self._store(accepted)
            finally:
                self._allowances.judge(accepted)
            stream = await relay.attach(parsed, make)
            assert stream is not None, "an acceptance that was appended is found"
        await self._answer_with(request, wanted, stream, headers)

    async def _answer_with(
        self, request: Request, wanted: Wanted, stream: Stream, headers: Headers = ()
    ) -> None:
        at = _parsed(stream.answer.id).at
        relay = await self._relays.of(at.shard, at.lane)
        if wanted.background:
            self._delivery.mind(relay, stream)
            shown = {"id": stream.answer.id, "object": "inference", "status": stream.answer.status}
            await request.answer(202, shown, headers)
            return
        await self._delivery.deliver(request, relay, stream, resumed=False, headers=headers)

    def _entry(self, wanted: Wanted, issued: KeyIssued, *, body: str = "") -> Entry:
        """Return what is fixed at the first try: the id, and the price in force."""
        request = ids.new_request_id(
            secret=self._secret,
            account=issued.account,
            at=Address(self._shard, self._lane, catalogue.slug(wanted.model)),
            floor=self._relays.own.position,
            entropy=self._entropy(ids.RANDOM_BYTES),
        )
        book, nonce = self._book, self._entropy(ids.RANDOM_BYTES).hex()
        plan = book.credits.of(issued.account).plan
        return Entry(request, body, nonce, book.price_version, book.position, plan)

    def _accepted(
        self, wanted: Wanted, issued: KeyIssued, entry: Entry, *, digest: str | None = None
    ) -> RequestAccepted:
        model = self._models.get(wanted.model)
        context = model.context_tokens if model else 0
        return RequestAccepted(
            request=entry.request,
            account=issued.account,
            key=issued.key,
            model=wanted.model,
            kind=wanted.kind,
            input=wanted.input,
            parameters=wanted.parameters,
            stream=wanted.stream,
            prompt_tokens_max=min(context, wanted.prompt_tokens_max or context),
            deadline_ms=DEADLINE_MS,
            price_version=entry.price_version,
            plan=entry.plan,
            book=entry.book,
            idempotency_hash=digest,
            detached=wanted.background or digest is not None,
        )

    def _open(self, wanted: Wanted, accepted: RequestAccepted) -> Stream:
        answer = self._answer(accepted, keep_text=not wanted.stream)
        return Stream(answer, _format(answer, wanted) if wanted.stream else None)

    def _answer(self, accepted: RequestAccepted, *, keep_text: bool) -> Answer:
        price = self._book.price(accepted.model, accepted.price_version)
        assert price is not None, "what is accepted has a price"
        return Answer(accepted, price, keep_text=keep_text)

    async def _append(self, stream: Stream) -> None:
        """Follow, then append the acceptance. Raises Refusal: then nothing was accepted, or is charged."""
        accepted = stream.answer.accepted
        relay = self._relays.own
        relay.open(stream)
        self._allowances.follow(accepted)
        try:
            await self._store(accepted)
            return
        except OutcomeUnknown:
            self._delivery.cancel_unanswered(accepted)
            message, headers = "the log does not answer; try again", retry_after(5)
            refusal = Refusal(503, message, code="log_unavailable", headers=headers)
        except LogFull:
            message, headers = "the log is full; try again later", retry_after(60)
            refusal = Refusal(503, message, code="log_full", headers=headers)
        except RecordTooLarge as error:
            refusal = Refusal(413, f"the request cannot be stored: {error}", code="body_too_large")
        relay.close(stream)
        self._allowances.refused(accepted, may_land=refusal.code == "log_unavailable")
        raise refusal

    async def _store(self, accepted: RequestAccepted) -> None:
        at = _parsed(accepted.request).at
        data = codec.encode(self._lane, [accepted])
        await append_until_known(
            self._log, subjects.shard_stream(at.shard), subjects.request(at), data, within_s=ACCEPT_S
        )

    async def _failed_by_us(self, claim: Claim) -> bool:
        """Say whether the key's request ended by a failure of ours: then the key may be taken again."""
        life = (await self._histories.read(_parsed(claim.entry.request))).life
        ours = life.reason in ("failed", "poison") or life.ender == "control" or life.wanted == "unanswered"
        return life.phase == "ended" and ours

    # --- a request that is there ------------------------------------------------------------------------

    async def _retrieve(self, request: Request, match: re.Match[str]) -> None:
        await request.answer(200, _shown(await self._read(request, match[1])))

    async def _cancel(self, request: Request, match: re.Match[str]) -> None:
        """202: the log knows of the wish; 200: the request had ended."""
        answer = await self._read(request, match[1])
        if answer.life.phase == "ended":
            return await request.answer(200, _shown(answer))
        await self._delivery.say_cancel(answer.id, "client")
        await request.answer(202, {"id": answer.id, "object": "inference", "status": "cancelling"})

    async def _resume(self, request: Request, match: re.Match[str]) -> None:
        """Stream the frames behind `Last-Event-ID` or `?after=`, the same as live; 204 behind the last."""
        parsed = self._verified(request, match[1])
        after = event_id(request)
        relay = await self._relays.of(parsed.at.shard, parsed.at.lane)

        def make(accepted: RequestAccepted) -> Stream:
            answer = self._answer(accepted, keep_text=False)
            return Stream(answer, NativeStream(answer), after=after)

        stream = await relay.attach(parsed, make)
        if stream is None:
            raise _unknown(match[1])
        counted = stream.answer.life.counted
        if after > counted:
            relay.close(stream)
            message = f"event {after} of this request does not exist yet; the last one is {counted}"
            raise Refusal(400, message, code="invalid_event_id", param="after")
        if stream.ended and after == counted:
            relay.close(stream)
            await request.body()
            await request.start(204, b"text/event-stream")
            await request.write(b"", more=False)
            return
        await request.body()
        await self._delivery.deliver(request, relay, stream, resumed=True)

    async def _read(self, request: Request, text: str) -> Answer:
        past = await self._histories.read(self._verified(request, text))
        if past.accepted is None:
            raise _unknown(text)
        answer = self._answer(past.accepted, keep_text=True)
        for counted in past.counted:
            answer.add(counted.event, counted.life, counted.stored_at_ns)
        return answer

    def _verified(self, request: Request, text: str) -> RequestId:
        issued = self._admission.authenticate(request)
        parsed = ids.verified(text, secret=self._secret, account=issued.account)
        if parsed is None:
            raise _unknown(text)
        return parsed

    # --- health ----------------------------------------------------------------------------------------

    async def _alive(self, request: Request, match: re.Match[str]) -> None:
        await request.answer(200, {"status": "ok"})

    async def _ready(self, request: Request, match: re.Match[str]) -> None:
        """Ready to accept: the log answers. Whether a model's replica runs is another question."""
        if not self._log.is_connected:
            message = "the log does not answer"
            raise Refusal(503, message, code="log_unavailable", headers=retry_after(1))
        ready = [name for name in self._models if self._fleet.is_ready(name)]
        await request.answer(200, {"status": "ready", "models_ready": ready})

    async def _version(self, request: Request, match: re.Match[str]) -> None:
        await request.answer(200, {"version": __version__})


def _format(answer: Answer, wanted: Wanted) -> Format:
    if wanted.kind == "inference":
        return NativeStream(answer)
    return openai.OpenAIStream(answer, include_usage=wanted.include_usage)


def _shown(answer: Answer) -> dict[str, Any]:
    shown = answer.inference(output=True) | {"status": answer.status}
    if failure := answer.failure():
        shown["error"] = failed(*failure).body()["error"]
    return shown


def _parsed(request: str) -> RequestId:
    parsed = parse_request_id(request)
    assert parsed is not None, "an id that we made is one"
    return parsed


def _unknown(text: str) -> Refusal:
    return Refusal(404, f"there is no request {text!r} here", code="request_not_found", param="id")
