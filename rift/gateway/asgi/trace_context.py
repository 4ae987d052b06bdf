"""Trace contexts, by W3C Trace Context: the span of a client that a request continues, and the request's own.

A request without a valid `traceparent` begins a trace. `events/ids.py` has the ids of traces and spans.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from events import ids
from events.schema import RequestAccepted

VERSION = "00"
# The flags that have a meaning: `sampled` and `random`. The standard sets all others to zero.
FLAGS = 0x03
SAMPLED = "01"
# The standard lets a `tracestate` be left out. It is stored with the request, so it is bounded.
STATE_BYTES_MAX = 512
STATE_MEMBERS_MAX = 32

# Versions after 00 may add fields after another hyphen.
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
_MEMBER = re.compile(r"[a-z0-9][a-z0-9_*/@-]{0,255}=[ -+\--<>-~]{0,255}[!-+\--<>-~]")


class TraceContext(NamedTuple):
    """The valid headers of a request. `traceparent` is as version 00 writes it."""

    traceparent: str
    tracestate: str | None


def read(traceparents: Sequence[str], tracestates: Sequence[str]) -> TraceContext | None:
    """Return the context that these headers have, None unless exactly one `traceparent` is valid.

    A `tracestate` that is not valid or too long is left out.
    """
    match = _TRACEPARENT.fullmatch(traceparents[0]) if len(traceparents) == 1 else None
    if match is None or (match[1] == VERSION and match[5] is not None):
        return None
    flags = int(match[4], 16) & FLAGS
    return TraceContext(f"{VERSION}-{match[2]}-{match[3]}-{flags:02x}", _state(tracestates))


def _state(tracestates: Sequence[str]) -> str | None:
    members = [member.strip(" \t") for member in ",".join(tracestates).split(",")]
    members = [member for member in members if member]
    state = ",".join(members)
    is_valid = len(members) <= STATE_MEMBERS_MAX and all(map(_MEMBER.fullmatch, members))
    return state if state and is_valid and len(state) <= STATE_BYTES_MAX else None


def traceparent(accepted: RequestAccepted) -> str:
    """Return the header that names a request's own span."""
    given = accepted.traceparent
    trace = ids.trace_id(accepted.request, group=accepted.group, traceparent=given)
    return f"{VERSION}-{trace}-{ids.span_id(accepted.request)}-{given[-2:] if given else SAMPLED}"
