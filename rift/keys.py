"""API keys: `rift_<id>_<secret><checksum>`. The id may be shown; the secret is shown
once.

The checksum (CRC-32) distinguishes a mistyped key from an unknown one without a lookup. Only the SHA-256 of
the whole key is stored.
"""

import base64
import zlib

import msgspec

# The permissions of a key. `admin` includes the others.
SCOPES = ("inference", "usage", "admin")

ID_BYTES = 5
SECRET_BYTES = 32
CHECKSUM_CHARACTERS = 7


class Key(msgspec.Struct, frozen=True):
    id: str
    text: str


def new_key(entropy: bytes) -> Key:
    """Return the key for ID_BYTES + SECRET_BYTES random bytes."""
    assert len(entropy) == ID_BYTES + SECRET_BYTES, f"a key takes {ID_BYTES + SECRET_BYTES} random bytes"
    head = f"rift_{_base32(entropy[:ID_BYTES])}_{_base32(entropy[ID_BYTES:])}"
    return Key(head.split("_")[1], head + _checksum(head))


def id_of(text: str) -> str:
    """Return the id in a whole key. Any other text is taken as an id."""
    parts = text.split("_")
    return parts[1] if len(parts) == 3 and parts[0] == "rift" else text


def is_well_formed(text: str) -> bool:
    """Return whether the checksum matches. If not, the key was mistyped or cut off."""
    head = text[:-CHECKSUM_CHARACTERS]
    checksum = text[-CHECKSUM_CHARACTERS:]
    return text.startswith("rift_") and text.count("_") == 2 and _checksum(head) == checksum


def _checksum(head: str) -> str:
    return _base32(zlib.crc32(head.encode()).to_bytes(4, "big"))


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()
