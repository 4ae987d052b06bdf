"""Ids. A request's id contains the address of its events, and a MAC so that ids cannot be forged.

    req_<shard>_<lane>_<model>_<floor>_<random>_<mac>

`floor` is a sequence below the request's first event: a reader of its history begins there. The MAC covers
the whole id and the account, so that a foreign or forged id is rejected before any read, like an unknown one.

The ids of spans, and of a trace that no client names, follow from the request's id, so that every reader of
the log names the same ones.

Randomness is an argument, so that a simulation can repeat itself.
"""

import base64
import hashlib
import hmac
import re

import msgspec

from events.subjects import Address

MAC_BYTES = 8
RANDOM_BYTES = 10
SECRET_BYTES = 32

_REQUEST_ID = re.compile(
    r"req_(\d{1,4})_([a-z0-9]{8,32})_([a-z0-9-]{1,63})_(\d{1,19})_([a-z2-7]{16})_([a-z2-7]{13})"
)


class RequestId(msgspec.Struct, frozen=True):
    text: str
    at: Address
    floor: int


def new_request_id(*, secret: bytes, account: str, at: Address, floor: int, entropy: bytes) -> str:
    assert len(entropy) == RANDOM_BYTES, f"a request id takes {RANDOM_BYTES} random bytes"
    body = f"req_{at.shard}_{at.lane}_{at.model}_{floor}_{_base32(entropy)}"
    return f"{body}_{_mac(secret, body, account)}"


def verified(text: str, *, secret: bytes, account: str) -> RequestId | None:
    """Return the parsed id if this installation issued it to this account, else None."""
    parsed = parse_request_id(text)
    if parsed is None:
        return None
    body, _, mac = text.rpartition("_")
    return parsed if hmac.compare_digest(mac, _mac(secret, body, account)) else None


def parse_request_id(text: str) -> RequestId | None:
    """Return the parsed id without checking its MAC, for readers of the log, which trust its writers."""
    match = _REQUEST_ID.fullmatch(text)
    if match is None:
        return None
    return RequestId(text, Address(int(match[1]), match[2], match[3]), int(match[4]))


def parsed(request: str) -> RequestId:
    """As `parse_request_id`, for the id of an accepted request, which is always valid."""
    valid = parse_request_id(request)
    assert valid is not None, f"{request!r} is not a request id"
    return valid


def trace_id(request: str, *, group: str | None, traceparent: str | None) -> str:
    """Return the id of a request's trace, as 32 hex digits; `requests.sql` computes the same.

    The client's trace has priority. The choices of a group share a trace.
    """
    return traceparent[3:35] if traceparent else _hex(group or request)[:32]


def span_id(of: str, part: str = "") -> str:
    """Return the id of a request's own span, or of a part of the span `of`, as 16 hex digits."""
    return _hex(f"{of} {part}")[:16]


def new_attempt_id(entropy: bytes) -> str:
    return f"att_{_base32(entropy)}"


def new_lane_id(entropy: bytes) -> str:
    return _base32(entropy)


def _mac(secret: bytes, body: str, account: str) -> str:
    digest = hmac.new(secret, f"{body}\0{account}".encode(), hashlib.sha256).digest()
    return _base32(digest[:MAC_BYTES])


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()
