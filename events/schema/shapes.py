"""Types that several events share."""

from typing import Annotated, Literal

import msgspec

Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
# A limit of 0 is not allowed: to stop an account, revoke its keys or set its budget to 0.
Limit = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Percent = Annotated[int, msgspec.Meta(ge=1, le=100)]
Amount = Annotated[int, msgspec.Meta(ge=-(2**63) + 1, le=2**63 - 1)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
Period = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-(0[1-9]|1[0-2])$")]
Account = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,40}$")]

Kind = Literal["inference", "completion", "chat", "response"]
Plan = Literal["per_token", "per_second"]
FinishReason = Literal[
    "stop", "length", "tool_calls", "cancelled", "revoked", "expired", "invalid", "failed", "poison"
]
ReleaseReason = Literal["draining", "host", "lost", "stalled"]
CancelReason = Literal["client", "disconnect", "superseded", "revoked", "unanswered"]


class Shape(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A part of an event."""


class Event(Shape, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag=True):
    """One fact. Its time is the stored time of its record."""
