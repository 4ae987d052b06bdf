"""A new request's way through the gateway, up to what the log says of it.

    authenticate → parse → admit → reserve → follow → append `RequestAccepted` → relay the log's words

Whatever is refused is refused before the append. From the append on, the log decides. A request with `n` > 1
is a group: all of its choices are appended, or those that were, or may still be, are said to be unanswered,
which nobody pays for.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial

import anyio
from msgspec.structs import replace

from events import codec, encryption, ids, subjects
from events.book import Book
from events.lifecycle import Life
from events.log import Log, LogError, LogFull, OutcomeUnknown, RecordTooLarge, append_until_known
from events.request_history import HistoryReader
from events.schema import KeyIssued, RequestAccepted
from events.subjects import Address
from rift.catalogue import Catalogue
from rift.gateway import choices as groups
from rift.gateway.admission.admission import Admission
from rift.gateway.admission.credit import CreditReservations
from rift.gateway.admission.reservation import Reservation, Reservations
from rift.gateway.asgi.errors import FINAL, Headers, HTTPError, retry_after
from rift.gateway.asgi.request import Request
from rift.gateway.choices import Choices
from rift.gateway.completion import Completion
from rift.gateway.dialects import dialect as dialects
from rift.gateway.dialects.dialect import Dialect
from rift.gateway.dialects.sampling import ParsedRequest
from rift.gateway.streams.delivery import Delivery
from rift.gateway.streams.lane_reader import LaneReader
from rift.gateway.streams.lane_registry import LaneRegistry
from rift.gateway.streams.subscription import Subscription
from rift.gateway.submission import idempotency
from rift.gateway.submission.idempotency import Claim, Entry

# A client that waits for its acceptance waits this long for the broker; a restart takes a second or two.
ACCEPT_S = 10.0

# Queue, a start of the model and answer together; nobody waits longer for an answer. The slowest start that
# is known takes 150 s, which leaves 7 minutes; three that fail end a request sooner.
DEADLINE_MS = 600_000

REPLAYED = [(b"idempotent-replayed", b"true")]


class Submission:
    def __init__(
        self,
        log: Log,
        relays: LaneRegistry,
        histories: HistoryReader,
        admission: Admission,
        delivery: Delivery,
        allowances: CreditReservations,
        *,
        book: Book,
        models: Catalogue,
        secret: bytes,
        lane: tuple[int, str],
        entropy: Callable[[int], bytes],
        seal_content: bool,
    ) -> None:
        self._log = log
        self._relays = relays
        self._histories = histories
        self._admission = admission
        self._delivery = delivery
        self._reservations = Reservations(
            log, relays.own, (admission.limiting, allowances), entropy=entropy, seals_all=seal_content
        )
        self._book = book
        self._models = models
        self._secret = secret
        self._entropy = entropy
        self._shard, self._lane = lane

    async def infer(self, dialect: Dialect, request: Request, match: re.Match[str]) -> None:
        issued = self._admission.authenticate(request)
        content_type = (request.header(b"content-type") or "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            message = "send the body with `Content-Type: application/json`"
            raise HTTPError(415, message, code="unsupported_media_type")
        body = await request.body()
        wanted = dialect.parse(body)
        if wanted.model not in self._models:
            # It raises: of a name that is not known no id is made.
            self._admission.admit(wanted, issued.account, issued.key)
        self._admission.check_model(wanted.model, issued.key)
        key = request.header(b"idempotency-key")
        if key is None:
            group = self._group(wanted, issued, self._entry(wanted, issued))
            await self._answer_new(request, wanted, await self._reserve(wanted, group))
            return
        digest = idempotency.key_digest(self._secret, issued.account, key)
        entry = self._entry(wanted, issued, body=idempotency.body_digest(self._secret, request.path, body))
        ours = self._group(wanted, issued, entry, digest=digest)
        claim, reservation = await self._claim(digest, entry, wanted, ours)
        if reservation is not None:
            await self._answer_new(request, wanted, reservation)
        else:
            headers = REPLAYED if claim.entry.nonce != entry.nonce else ()
            group = self._group(wanted, issued, claim.entry, digest=digest)
            await self._answer_again(request, wanted, group, headers)

    async def _reserve(self, wanted: ParsedRequest, group: Choices) -> Reservation:
        """Raises HTTPError, LogError: then nothing is held."""
        self._admission.admit(wanted, group[0].account, group[0].key)
        return await self._reservations.reserve(group, store=wanted.store)

    async def _claim(
        self, digest: str, entry: Entry, wanted: ParsedRequest, group: Choices
    ) -> tuple[Claim, Reservation | None]:
        """Return the claim in force and, if it is a new one, what its request holds: reserving comes first,
        because the acceptance must follow the claim at once. Claim a key again if its request failed by our
        fault."""
        found = await idempotency.find(self._log, digest, entry)
        if found is not None and not await self._failed_by_us(found, group):
            return found, None
        reservation = await self._reserve(wanted, group)
        is_new = False
        try:
            entry = replace(entry, sealed=reservation.choices[0].sealed)
            claim = await idempotency.claim(self._log, digest, entry, replaces=found.sequence if found else 0)
            is_new = claim.is_new
        finally:
            if not is_new:
                reservation.release()
        return claim, reservation if is_new else None

    async def _answer_new(self, request: Request, wanted: ParsedRequest, reservation: Reservation) -> None:
        stream = self._stream(self._relays.own, wanted, reservation.choices)
        await self._append(stream, reservation)
        await self._answer_with(request, wanted, stream)

    async def _answer_again(
        self, request: Request, wanted: ParsedRequest, group: Choices, headers: Headers
    ) -> None:
        """Attach to the request that an idempotency key stands for, from its first event."""
        parsed = [ids.parsed(accepted.request) for accepted in group]
        relay = await self._relays.of(parsed[0].at.shard, parsed[0].at.lane)
        make = partial(self._stream, relay, wanted)
        stream = await relay.attach(parsed, make)
        if stream is None or len(stream.answers) < len(group):
            # The gateway that claimed the key died before it had accepted all, or the log was trimmed.
            if stream is not None:
                relay.close(stream)
            await idempotency.check_kept(self._log, parsed[0])
            reservation = await self._reserve(wanted, group)
            try:
                await self._store(reservation.choices)
            except LogError as error:
                raise _not_stored(error) from error
            finally:
                # Another gateway may append the acceptances too: the log decides which of them count.
                reservation.outcome_unknown()
            stream = await relay.attach(parsed, make)
            assert stream is not None, "an acceptance that was appended is found"
        await self._answer_with(request, wanted, stream, headers)

    async def _answer_with(
        self, request: Request, wanted: ParsedRequest, stream: Subscription, headers: Headers = ()
    ) -> None:
        answer = stream.answer
        request.own_id = answer.id
        at = ids.parsed(answer.id).at
        relay = await self._relays.of(at.shard, at.lane)
        if wanted.background and not wanted.stream:
            relay.release_client(stream)
            background = dialects.of(wanted.kind).background
            assert background is not None, "only these APIs parse `background`"
            await request.answer(*background(answer), headers)
            return
        await self._delivery.deliver(request, relay, stream, resumed=False, headers=headers)

    def _entry(self, wanted: ParsedRequest, issued: KeyIssued, *, body: str = "") -> Entry:
        """Return what is fixed at the first try: the id, and the price in force."""
        request = ids.new_request_id(
            secret=self._secret,
            account=issued.account,
            at=Address(self._shard, self._lane, subjects.slug(wanted.model)),
            floor=self._relays.own.position,
            entropy=self._entropy(ids.RANDOM_BYTES),
        )
        book = self._book
        nonce = self._entropy(ids.RANDOM_BYTES).hex()
        plan = book.credits.of(issued.account).plan
        return Entry(request, body, nonce, book.price_version, book.position, plan)

    def _group(
        self, wanted: ParsedRequest, issued: KeyIssued, entry: Entry, *, digest: str | None = None
    ) -> Choices:
        model = self._models.get(wanted.model)
        context = model.context_tokens if model else 0
        first = RequestAccepted(
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
            sealed=entry.sealed,
            detached=wanted.background or digest is not None,
            metadata=wanted.metadata,
        )
        return groups.of(first, wanted.choices, secret=self._secret)

    def _stream(
        self, relay: LaneReader, wanted: ParsedRequest, group: Sequence[RequestAccepted]
    ) -> Subscription:
        dialect = dialects.of(wanted.kind)
        keep = not wanted.stream or dialect.streams_text
        answers = [Completion.of(accepted, self._book, keep_text=keep) for accepted in group]
        format = dialect.stream(answers, wanted) if wanted.stream else None
        return Subscription(answers, relay.client(format))

    async def _append(self, stream: Subscription, reservation: Reservation) -> None:
        """Follow, then append the acceptances. Raises HTTPError: then nothing is charged."""
        group = reservation.choices
        reservation.follow(stream)
        try:
            await self._store(group, stream)
        except LogError as error:
            refusal = _not_stored(error)
            if refusal.code == "log_unavailable" or len(group) > 1:
                self._delivery.cancellation.cancel_unanswered(group)
                reservation.outcome_unknown()
            else:
                reservation.release()
            raise refusal from error
        reservation.commit()
        self._check_key(group)

    def _check_key(self, group: Choices) -> None:
        """Who heard that the key is revoked before the acceptance was stored could not end it."""
        if self._book.keys[group[0].key].revoked_at_ns is not None:
            self._delivery.cancellation.revoke(accepted.request for accepted in group)

    async def _store(self, group: Choices, stream: Subscription | None = None) -> None:
        """Append each acceptance, sealed if it has a key; `stream` opens what comes of it. Raises LogError:
        OutcomeUnknown if one's outcome is."""
        failed: list[LogError] = []

        async def store(accepted: RequestAccepted) -> None:
            at = ids.parsed(accepted.request).at
            shard = subjects.shard_stream(at.shard)
            subject = subjects.request(at)
            try:
                seal = await encryption.seal_of(self._log, accepted)
                if seal is None and accepted.sealed is not None:
                    raise encryption.KeyErased(accepted.request)
                if stream is not None:
                    stream.decrypt_with(accepted.request, seal)
                data = codec.encode(self._lane, [accepted if seal is None else seal.closed(accepted)])
                await append_until_known(self._log, shard, subject, data, within_s=ACCEPT_S)
            except LogError as error:
                failed.append(error)

        if len(group) == 1:
            await store(group[0])
        else:
            async with anyio.create_task_group() as tasks:
                for accepted in group:
                    tasks.start_soon(store, accepted)
        if failed:
            raise next((error for error in failed if isinstance(error, OutcomeUnknown)), failed[0])

    async def _failed_by_us(self, claim: Claim, group: Choices) -> bool:
        """Say whether the key's request ended by a failure of ours: then the key may be taken again."""
        first = replace(group[0], request=claim.entry.request)
        named = groups.of(first, len(group), secret=self._secret)
        pasts = await self._histories.read_all([ids.parsed(accepted.request) for accepted in named])
        return any(_is_our_failure(past.life) for past in pasts)


def _not_stored(error: LogError) -> HTTPError:
    match error:
        case RecordTooLarge():
            return HTTPError(413, f"the request cannot be stored: {error}", code="body_too_large")
        case LogFull():
            message = "the log is full; try again later"
            headers = retry_after(60)
            return HTTPError(503, message, code="log_full", headers=headers)
        case encryption.KeyErased():
            message = "the content of this request was removed before it was accepted; use a new key"
            return HTTPError(410, message, code="content_removed", headers=FINAL)
    message = "the log does not answer; try again"
    headers = retry_after(5)
    return HTTPError(503, message, code="log_unavailable", headers=headers)


def _is_our_failure(life: Life) -> bool:
    ours = life.reason in ("failed", "poison") or life.ender == "control" or life.wanted == "unanswered"
    return life.phase == "ended" and ours
