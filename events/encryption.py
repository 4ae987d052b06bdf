"""Encrypt content that must be forgotten early. Only this module uses cryptography.

No single record of a shard can be removed or rewritten. So a request's prompt and answer are encrypted before
they are appended, with a key that is stored in `RIFT_SECRETS` and can be erased there. Everything that counts
stays readable: a sealed event folds, is billed and is archived like any other.

    sealed event    the redacted event (`redaction.py`), and in `content` its whole JSON, AES-256-GCM, base64
    nonce           a keyed hash of the plain event, so that an event that is sent again has the same bytes
    key             random, for all requests of a body, named by its sequence in `RIFT_SECRETS`

The callers decide which requests are sealed and when a key is erased.
"""

import base64
import hmac
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
    """A message of `RIFT_SECRETS`. The requests of one body share a key and are forgotten together."""

    requests: tuple[str, ...]
    key: bytes
    # Whose content it is, so that gateways can count each account's keys.
    account: str = ""


_secret = msgspec.json.Decoder(Secret)
_event = msgspec.json.Decoder(AnyEvent)


class ContentUndecipherable(LogError):
    """The content was not encrypted with this key, so another writer must have appended it."""


class KeyErased(LogError):
    """The request cannot be sealed: its content key is erased."""


class Cipher:
    """Encrypts and decrypts the events of one request."""

    def __init__(self, request: str, key: bytes) -> None:
        self._request = request
        self._key = key
        self._cipher = AESGCM(key)

    def closed(self, event: AnyEvent) -> AnyEvent:
        """Return the event as it is appended."""
        redacted, content = redaction.split(event)
        if content is None:
            return event
        plain = codec.encode_event(event)
        associated = self._request.encode()
        nonce = hmac.digest(self._key, associated + plain, "sha256")[:NONCE_BYTES]
        sealed = nonce + self._cipher.encrypt(nonce, plain, associated)
        return replace(redaction.decode(redacted), content=base64.b64encode(sealed).decode())

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
                f"{self._request}: {type(event).__name__} cannot be decrypted with the request's key"
            ) from error


async def keep(log: Log, subject: str, secret: Secret) -> int:
    """Append a key and return its sequence.

    Raises LogFull: then nothing is stored. Raises another LogError: then encrypt nothing with the key, since
    it may be stored any number of times, at unknown sequences.
    """
    return await log.append(subjects.SECRETS, subject, msgspec.json.encode(secret))


async def secret(log: Log, sequence: int) -> Secret | None:
    """Return a stored key, None if it is erased. Raises LogError."""
    stored = await log.get(subjects.SECRETS, sequence)
    return read(stored.data) if stored is not None else None


def read(data: bytes) -> Secret:
    return _secret.decode(data)


async def cipher_of(log: Log, accepted: RequestAccepted) -> Cipher | None:
    """Return a request's cipher, None if it is not sealed or its key is erased. Raises LogError."""
    if accepted.sealed is None or (stored := await secret(log, accepted.sealed)) is None:
        return None
    return Cipher(accepted.request, stored.key)


async def opened(log: Log, accepted: RequestAccepted) -> tuple[RequestAccepted, Cipher | None]:
    """Return the decrypted request and its cipher; unchanged and None if it has no key. Raises LogError."""
    cipher = await cipher_of(log, accepted)
    return (accepted if cipher is None else cipher.opened(accepted)), cipher
