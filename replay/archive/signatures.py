"""Ed25519 signatures of what control states: each archived segment, and each closed month.

A password for the broker is enough to append such an event, but not to sign it. The public key is in the
book, where only operators can put it. Beside `events/encryption.py` only this module uses
cryptography.
"""

from collections.abc import Container, Iterable, Iterator
from typing import TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec.structs import replace

from events.schema import PeriodClosed, SegmentSealed

KEY_BYTES = 32

Signed = TypeVar("Signed", PeriodClosed, SegmentSealed)


class SigningKey:
    """A private key of KEY_BYTES; `public` is its public key in hex."""

    def __init__(self, private: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(private)
        self.public = self._key.public_key().public_bytes_raw().hex()

    def signed(self, event: Signed) -> Signed:
        """Return the event with our signature."""
        return replace(event, signer=self.public, signature=self._key.sign(message(event)).hex())


def signed(event: Signed, key: SigningKey | None) -> Signed:
    """Return the event with the signature of a key, or as it is without one."""
    return event if key is None else key.signed(event)


def message(event: PeriodClosed | SegmentSealed) -> bytes:
    """Return what is signed of an event, one line each. `replay/auditor.py` has the same lines."""
    if isinstance(event, SegmentSealed):
        return f"rift segment\n{event.manifest}\n".encode()
    lines = ["rift period", event.period, event.digest, str(event.rules)]
    lines += [f"{stream} {event.positions[stream]}" for stream in sorted(event.positions)]
    lines += [f"{stream} {event.roots[stream]}" for stream in sorted(event.roots)]
    return "".join(f"{line}\n" for line in lines).encode()


def is_valid(event: PeriodClosed | SegmentSealed) -> bool:
    """Return whether the event's signer signed it."""
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(event.signer))
        key.verify(bytes.fromhex(event.signature), message(event))
    except (InvalidSignature, ValueError):
        return False
    return True


def problems(stated: Iterable[PeriodClosed | SegmentSealed], keys: Container[str]) -> Iterator[str]:
    """Yield what is wrong with the signatures of a book's segments and closed months, in its order.

    From the first valid signature by one of `keys` on, control signs, so every later event needs one.
    """
    signs = False
    for event in stated:
        if isinstance(event, SegmentSealed):
            where = f"{event.stream} {event.first} to {event.last}"
        else:
            where = f"the close of {event.period}"
        if not event.signature:
            if signs:
                yield f"{where}: not signed, although the book has a signed entry before it"
        elif not is_valid(event):
            yield f"{where}: the book has a signature that is not valid"
        elif event.signer not in keys:
            yield f"{where}: signed with key {event.signer}, which no operator published"
        else:
            signs = True
