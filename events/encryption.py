"""Content that can be forgotten before its time: the only door to cryptography.

No record of a shard can be removed by itself or written again. So what a request says, and is told, is
sealed before it is appended, with a key that stands in `RIFT_SECRETS` and can be erased there. What counts
stays in the clear: a sealed event folds, is billed and is archived as any other.

    sealed event    the bare event (`bare.py`), and in `content` its whole JSON, AES-256-GCM, base64
    nonce           a keyed hash of what is sealed: an event that is sent again is the same bytes
    key             random, of one request or of one group, named by the sequence it stands at

What must not live here: who is sealed, and when a key is erased.
"""

import base64
import hmac
from collections.abc import Sequence
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec.structs import replace

from events import codec, redaction, subjects
from events.log import Log, LogError
from events.schema import AnyEvent, RequestAccepted

KEY_BYTES = 32
NONCE_BYTES = 12


class Secret(msgspec.Struct, frozen=True):
    """What a message of `RIFT_SECRETS` holds. The choices of a group are forgotten together."""

    requests: tuple[str, ...]
    key: bytes


_secret = msgspec.json.Decoder(Secret)
_event = msgspec.json.Decoder(AnyEvent)


class ContentUndecipherable(LogError):
    """What is sealed is not what this key sealed: somebody else has written it."""


class KeyErased(LogError):
    """What was to be sealed has no key any more."""


class Cipher:
    """One request's, to close and to open its events with."""

    def __init__(self, request: str, key: bytes) -> None:
        self._request = request
        self._key = key
        self._cipher = AESGCM(key)

    def closed(self, event: AnyEvent) -> AnyEvent:
        """Return the event as it is appended."""
        told, content = redaction.split(event)
        if content is None:
            return event
        said = codec.encode_event(event)
        about = self._request.encode()
        nonce = hmac.digest(self._key, about + said, "sha256")[:NONCE_BYTES]
        sealed = nonce + self._cipher.encrypt(nonce, said, about)
        return replace(redaction.decode(told), content=base64.b64encode(sealed).decode())

    def opened(self, event: Any) -> Any:
        """Return the event as it was before encryption. Raises ContentUndecipherable."""
        if not getattr(event, "content", ""):
            return event
        try:
            sealed = base64.b64decode(event.content)
            nonce = sealed[:NONCE_BYTES]
            rest = sealed[NONCE_BYTES:]
            return _event.decode(self._cipher.decrypt(nonce, rest, self._request.encode()))
        except (InvalidTag, ValueError) as error:
            raise ContentUndecipherable(
                f"{self._request}: {type(event).__name__} cannot be opened"
            ) from error


async def keep(log: Log, subject: str, requests: Sequence[str], key: bytes) -> int:
    """Append a key, and return where it stands. Raises LogError: then no content may be sealed with it, since
    nobody knows how often, and where, it may stand."""
    data = msgspec.json.encode(Secret(tuple(requests), key))
    return await log.append(subjects.SECRETS, subject, data)


async def secret(log: Log, sequence: int) -> Secret | None:
    """Return a key that was kept, None once it is erased. Raises LogError."""
    stored = await log.get(subjects.SECRETS, sequence)
    return read(stored.data) if stored is not None else None


def read(data: bytes) -> Secret:
    return _secret.decode(data)


async def seal_of(log: Log, accepted: RequestAccepted) -> Cipher | None:
    """Return a request's seal, None if it has none or has none any more. Raises LogError."""
    if accepted.sealed is None or (found := await secret(log, accepted.sealed)) is None:
        return None
    return Cipher(accepted.request, found.key)


async def opened(log: Log, accepted: RequestAccepted) -> tuple[RequestAccepted, Cipher | None]:
    """Return the request and its seal; closed as it is once its content is removed. Raises LogError."""
    seal = await seal_of(log, accepted)
    return (accepted if seal is None else seal.opened(accepted)), seal
