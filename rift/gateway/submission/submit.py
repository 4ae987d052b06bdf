"""A new request's way into the log.

    authenticate → parse → reserve → (claim the idempotency key) → follow → append `RequestAccepted` → answer

Every error before the append leaves nothing behind. After it, the log decides. A body with several prompts or
`n` > 1 is several requests: if not all of them are stored, those that are, or may still be, are cancelled as
unanswered, and cost nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from msgspec.structs import replace

from events.schema import KeyIssued
from rift.gateway.admission.admission import Admission
from rift.gateway.admission.reservation import Reservation
from rift.gateway.asgi.request import Request
from rift.gateway.dialects.dialect import Dialect
from rift.gateway.dialects.sampling import ParsedRequest
from rift.gateway.submission.acceptance import AcceptanceBuilder
from rift.gateway.submission.acceptance_writer import AcceptanceWriter
from rift.gateway.submission.body_reader import BodyReader
from rift.gateway.submission.idempotency import IdempotencyKeys
from rift.gateway.submission.responder import Answer, Responder

REPLAYED = [(b"idempotent-replayed", b"true")]


class Submission:
    """`readers` counts a client of an account that reads what another has stored. Raises HTTPError (429)."""

    def __init__(
        self,
        admission: Admission,
        keys: IdempotencyKeys,
        builder: AcceptanceBuilder,
        writer: AcceptanceWriter,
        responder: Responder,
        readers: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._readers = readers
        self._admission = admission
        self._keys = keys
        self._builder = builder
        self._writer = writer
        self._responder = responder
        self.bodies = BodyReader(admission, keys)

    async def infer(self, dialect: Dialect, request: Request) -> None:
        """Accept a request and answer it. Raises HTTPError, LogError, ClientGone."""
        issued = self._admission.auth.authenticate(request)
        parsed, body_digest = await self.bodies.read(dialect, request, issued)
        with ExitStack() as held:
            if request.header(b"idempotency-key") is None:
                answer = await self._subscribe(request, parsed, issued)
            else:
                answer = await self._subscribe_once(request, parsed, issued, body_digest, held)
            # Many clients may wait for the answer to one large body, so none keeps it.
            del parsed
            await answer()

    async def _subscribe(self, request: Request, parsed: ParsedRequest, issued: KeyIssued) -> Answer:
        """Accept a request without an idempotency key."""
        entry = self._builder.entry(parsed, issued.account, request.client_id)
        choices = self._builder.build(parsed, issued, entry)
        return await self._accept(request, parsed, await self._admission.reserve(parsed, choices))

    async def _subscribe_once(
        self, request: Request, parsed: ParsedRequest, issued: KeyIssued, body_digest: str, held: ExitStack
    ) -> Answer:
        """Follow the one request of an idempotency key, by whichever client and gateway it was created.

        `held` counts a client of a stored request among its account's readers.
        """
        key = request.header(b"idempotency-key")
        assert key is not None, "called for a request with a key"
        digest = self._keys.key_digest(issued.account, key)
        entry = self._builder.entry(parsed, issued.account, request.client_id, body=body_digest)
        choices = self._builder.build(parsed, issued, entry, digest=digest)
        is_new = False
        async with self._keys.turn(digest, lambda: self._readers(issued.account)):
            claim = await self._keys.find(digest, entry)
            failed = None
            if claim is not None:
                with self._readers(issued.account):
                    failed = claim if await self._keys.failed_by_us(request, claim, choices) else None
            if claim is None or failed is not None:
                # Before the claim, because the acceptance must follow a claim at once.
                reservation = await self._admission.reserve(parsed, choices)
                try:
                    entry = replace(entry, sealed=reservation.choices[0].sealed)
                    with self._admission.while_writable():
                        claim = await self._keys.claim(digest, entry, replaces=claim.sequence if claim else 0)
                    is_new = claim.is_new
                finally:
                    if not is_new:
                        reservation.release()
        if is_new:
            if failed is not None:
                self._writer.discard(self._builder.build(parsed, issued, failed.entry, digest=digest))
            return await self._accept(request, parsed, reservation)
        is_replayed = claim.entry.nonce != entry.nonce
        choices = self._builder.build(parsed, issued, claim.entry, digest=digest)
        held.enter_context(self._readers(issued.account))
        subscription = await self._responder.attach(request, parsed, choices)
        if subscription is None:
            # The gateway that claimed the key died before it had accepted all, or the log was trimmed.
            await self._keys.check_kept(choices[0].request)
            await self._writer.complete(await self._admission.reserve(parsed, choices), request.age_ns)
            subscription = await self._responder.attach(request, parsed, choices)
            assert subscription is not None, "an acceptance that was appended is found"
        return self._responder.answer(request, parsed, subscription, REPLAYED if is_replayed else ())

    async def _accept(self, request: Request, parsed: ParsedRequest, reservation: Reservation) -> Answer:
        subscription = self._responder.subscribe(parsed, reservation.choices)
        await self._writer.accept(reservation, subscription, request.age_ns)
        return self._responder.answer(request, parsed, subscription)
