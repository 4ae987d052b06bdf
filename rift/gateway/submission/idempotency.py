"""Idempotency keys: one request for each account, key and body, even if a gateway fails between the steps.

    1. claim   create the key's entry: request id, hash of the body, nonce. A conflict is answered by the
               stored entry: another body (422), or a request to attach to, perhaps by an earlier try of this
               claim
    2. accept  the gateway that certainly created the entry appends the acceptance, with the entry's id
    3. attach  every other gateway waits for that request, and appends the acceptance if it is missing

If a gateway dies between 1 and 2, the next client's gateway accepts the request. If the log has been trimmed
past the place of its acceptance, the request may have run and been charged, so the answer is 410.
"""

import hashlib
import hmac
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager

import anyio
import msgspec
from msgspec.structs import replace

from events import ids, subjects
from events.broker_clock import BrokerClock
from events.contracts import IDEMPOTENCY_S, SECOND_NS
from events.lifecycle import Life
from events.log import Conflict, LogFull, OutcomeUnknown
from events.schema import Plan
from rift.gateway import choices as groups
from rift.gateway.asgi.errors import FINAL, HTTPError, retry_after_ms
from rift.gateway.asgi.request import Request
from rift.gateway.choices import Choices
from rift.gateway.dialects.sampling import Body
from rift.gateway.state import LogState

KEY_CHARACTERS_MAX = 255

# A claim is repeated while its outcome is unknown: together longer than the broker's restart.
CLAIMS_MAX = 5


class KeyEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """The request of a key. `price_version`, `book`, `plan`, `sealed` and `client_request_id` go into the
    acceptance unchanged."""

    request: str
    body: str
    nonce: str
    price_version: int
    book: int
    plan: Plan = "per_token"
    sealed: int | None = None
    # Whose key it is, so that gateways can count each account's.
    account: str = ""
    client_request_id: str | None = None


class KeyClaim(msgspec.Struct, frozen=True):
    """The entry in force, whether this call certainly created it, and its sequence (to replace it)."""

    entry: KeyEntry
    is_new: bool
    sequence: int


_entry = msgspec.json.Decoder(KeyEntry)


class IdempotencyKeys:
    def __init__(self, state: LogState, secret: bytes, clock: BrokerClock) -> None:
        self._clock = clock
        self._log = state.log
        self._histories = state.histories
        self._secret = secret
        self._claiming: dict[str, anyio.Event] = {}

    @asynccontextmanager
    async def turn(
        self, digest: str, waiting: Callable[[], AbstractContextManager[None]]
    ) -> AsyncIterator[None]:
        """Let one try of a key look for its claim and make it, and the others wait for it once.

        If it fails, they go on at the same time, so that a silent log does not answer them one by one.
        `waiting` counts those that wait. Raises HTTPError (429) if there are too many.
        """
        if (earlier := self._claiming.get(digest)) is not None:
            with waiting():
                await earlier.wait()
            yield
            return
        ended = self._claiming[digest] = anyio.Event()
        try:
            yield
        finally:
            del self._claiming[digest]
            ended.set()

    def key_digest(self, account: str, key: str) -> str:
        """Return the name that a key is stored under, so that no client's text becomes a subject.

        Raises HTTPError (400).
        """
        if not 0 < len(key) <= KEY_CHARACTERS_MAX:
            raise HTTPError(
                400,
                f"Idempotency-Key must have 1 to {KEY_CHARACTERS_MAX} characters, got {len(key)}",
                code="invalid_idempotency_key",
                param="Idempotency-Key",
            )
        return hmac.new(self._secret, f"{account}\0{key}".encode(), hashlib.sha256).hexdigest()[:32]

    def body_digest(self, path: str, body: Body) -> str:
        """Return a keyed hash of a body: without the secret, guesses at the body cannot be checked."""
        digest = hmac.new(self._secret, path.encode() + b"\0", hashlib.sha256)
        # Not joined, because a body may be large.
        digest.update(body)
        return digest.hexdigest()

    async def find(self, digest: str, entry: KeyEntry) -> KeyClaim | None:
        """Return the claim of a key, if it is for the same body. Raises HTTPError (422), LogError."""
        stored = await self._log.last(subjects.KEYS, subjects.idempotency(digest))
        if stored is None:
            return None
        earlier = _entry.decode(stored.data)
        if earlier.body != entry.body:
            raise HTTPError(
                422,
                "this Idempotency-Key was used with another body within 24 hours; use a new key",
                code="idempotency_key_reused",
                param="Idempotency-Key",
                headers=FINAL,
            )
        return KeyClaim(earlier, False, stored.sequence)

    async def claim(self, digest: str, entry: KeyEntry, *, replaces: int) -> KeyClaim:
        """Store `entry` in place of the one at sequence `replaces` (0: none), or return the first claim.

        Raises HTTPError (422, 503), LogError.
        """
        data = msgspec.json.encode(entry)
        subject = subjects.idempotency(digest)
        for attempt in range(CLAIMS_MAX):
            try:
                sequence = await self._log.append(subjects.KEYS, subject, data, expect_last=replaces)
                return KeyClaim(entry, True, sequence)
            except Conflict:
                try:
                    claim = await self.find(digest, entry)
                except HTTPError:
                    await self._discard_content_key(entry)
                    raise
                if claim is not None:
                    if entry.sealed != claim.entry.sealed:
                        await self._discard_content_key(entry)
                    return claim
                replaces = 0
            except LogFull as error:
                if attempt == 0:
                    await self._discard_content_key(entry)
                raise await self._full() from error
            except OutcomeUnknown:
                if attempt == CLAIMS_MAX - 1:
                    raise
        raise OutcomeUnknown("the key's entry was created and removed meanwhile; try again")

    async def _discard_content_key(self, entry: KeyEntry) -> None:
        """Erase the content key of a try that is not stored: it would stay for a day. Raises LogError."""
        if entry.sealed is not None:
            await self._log.erase(subjects.SECRETS, entry.sealed)

    async def _full(self) -> HTTPError:
        """Return the answer while no key can be stored: until the oldest expires. Raises LogError."""
        wait_ns = 0
        oldest = await self._log.get(subjects.KEYS, await self._log.first_sequence(subjects.KEYS))
        if oldest is not None:
            expires_ns = oldest.stored_at_ns + int(IDEMPOTENCY_S * SECOND_NS)
            wait_ns = expires_ns - self._clock.now_ns()
        wait_ms = max(1000, -(-wait_ns // 1_000_000))
        message = (
            "the log can store no more idempotency keys: send the request without the header "
            f"Idempotency-Key, or try again in {wait_ms // 1000} s, when the oldest key has expired"
        )
        return HTTPError(503, message, code="idempotency_keys_full", headers=retry_after_ms(wait_ms))

    async def failed_by_us(self, request: Request, claim: KeyClaim, choices: Choices) -> bool:
        """Return whether the key's request failed by our fault: then the key may be claimed again.

        Raises ClientGone, HTTPError (429), LogError.
        """
        first = replace(choices[0], request=claim.entry.request)
        named = [ids.parsed(one) for one in groups.request_ids(first, len(choices), secret=self._secret)]

        async def lives(bytes_max: float) -> list[Life]:
            return [past.life for past in await self._histories.read_all(named, bytes_max=bytes_max)]

        return any(map(_is_our_failure, await self._histories.in_turn(request, first.account, lives)))

    async def check_kept(self, request: str) -> None:
        """Raise HTTPError (410) if the log may have trimmed a request's acceptance. Raises LogError."""
        parsed = ids.parsed(request)
        if await self._log.first_sequence(subjects.shard_stream(parsed.at.shard)) > parsed.floor + 1:
            raise HTTPError(
                410,
                "the request of this Idempotency-Key is no longer kept; to run it again, use a new key",
                code="answer_removed",
                param="Idempotency-Key",
                headers=FINAL,
            )


def _is_our_failure(life: Life) -> bool:
    ours = life.reason in ("failed", "poison") or life.ender == "control" or life.wanted == "unanswered"
    return life.phase == "ended" and ours
