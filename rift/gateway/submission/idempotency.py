"""Idempotency keys: one request for each account, key and body, whatever fails between the steps.

    1. claim   create the key's entry: request id, body's hash, nonce. A conflict is answered by what is
               there: another body (422), or a request to attach to, be it by an earlier try of this claim
    2. accept  who surely made the entry appends the acceptance, with the id that it holds
    3. attach  everybody else waits for that request; who finds its acceptance missing appends it

A gateway that dies between 1 and 2 leaves an entry whose request the next client's gateway accepts, unless
the log was trimmed where its acceptance would be: then it may have been charged, and is gone (410).
"""

import hashlib
import hmac

import msgspec

from events import subjects
from events.ids import RequestId
from events.log import Conflict, Log, OutcomeUnknown
from events.schema import Plan
from rift.gateway.asgi.errors import FINAL, HTTPError

KEY_CHARACTERS_MAX = 255

# A claim is repeated while its outcome is unknown: once more than a broker's restart takes.
CLAIMS_MAX = 5


class Entry(msgspec.Struct, frozen=True):
    """What a key stands for. `price_version`, `book`, `plan` and `sealed` are what the acceptance freezes."""

    request: str
    body: str
    nonce: str
    price_version: int
    book: int
    plan: Plan = "per_token"
    sealed: int | None = None


class Claim(msgspec.Struct, frozen=True):
    """The entry in force, whether it is surely nobody else's yet, and where it stands (to replace it)."""

    entry: Entry
    is_new: bool
    sequence: int


_entry = msgspec.json.Decoder(Entry)


def key_digest(secret: bytes, account: str, key: str) -> str:
    """Return what a key is stored under: nothing that a client wrote becomes a subject."""
    if not 0 < len(key) <= KEY_CHARACTERS_MAX:
        raise HTTPError(
            400,
            f"Idempotency-Key must have 1 to {KEY_CHARACTERS_MAX} characters",
            code="invalid_idempotency_key",
            param="Idempotency-Key",
        )
    return hmac.new(secret, f"{account}\0{key}".encode(), hashlib.sha256).hexdigest()[:32]


def body_digest(secret: bytes, path: str, body: bytes) -> str:
    """Return what tells one body from another, and is no use to try bodies out."""
    return hmac.digest(secret, path.encode() + b"\0" + body, "sha256").hex()


async def find(log: Log, digest: str, entry: Entry) -> Claim | None:
    """Return the claim that is there, if it is for the same body. Raises HTTPError (422), LogError."""
    stored = await log.last(subjects.KEYS, subjects.idempotency(digest))
    if stored is None:
        return None
    found = _entry.decode(stored.data)
    if found.body != entry.body:
        raise HTTPError(
            422,
            "this Idempotency-Key was used with another body within 24 hours",
            code="idempotency_key_reused",
            param="Idempotency-Key",
            headers=FINAL,
        )
    return Claim(found, False, stored.sequence)


async def claim(log: Log, digest: str, entry: Entry, *, replaces: int) -> Claim:
    """Make `entry` the key's in place of what stands at `replaces` (0: nothing), or return who came first.

    Raises HTTPError (422), LogError.
    """
    for attempt in range(CLAIMS_MAX):
        try:
            data = msgspec.json.encode(entry)
            subject = subjects.idempotency(digest)
            sequence = await log.append(subjects.KEYS, subject, data, expect_last=replaces)
            return Claim(entry, True, sequence)
        except Conflict:
            found = await find(log, digest, entry)
            if found is not None:
                return found
            replaces = 0
        except OutcomeUnknown:
            if attempt == CLAIMS_MAX - 1:
                raise
    raise OutcomeUnknown("the key's entry came and went; try again")


async def check_kept(log: Log, request: RequestId) -> None:
    """Raise HTTPError (410) if the log may have held the acceptance and no longer does. Raises LogError."""
    if await log.first_sequence(subjects.shard_stream(request.at.shard)) > request.floor + 1:
        raise HTTPError(
            410,
            "the request of this Idempotency-Key is no longer kept; to run it again, use a new key",
            code="answer_removed",
            param="Idempotency-Key",
            headers=FINAL,
        )
