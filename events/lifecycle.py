"""The life of a request: one table and one pure function, which every reader calls.

Gateways, workers, the janitor and the projector each read the log in order and call `advance`. They cannot
disagree on what counts, because order is the only fence: no lock, clock or delivery count takes part.

    event                          counts if                                  effect
    RequestAccepted                none                                       open, no attempt
    AttemptStarted                 open, after == the attempt that counted    current and live; from here on
                                   last, resume_index == next_index, new id   all older attempts are ignored
    TokensGenerated                attempt current and live,                  next_index grows
                                   index == next_index
    AttemptReleased                attempt current and live                   not live; ended if wanted
    CancelRequested, no attempt    open                                       live: wanted; not live: ended
    CancelRequested of an attempt  never                                      (for that attempt's worker)
    RequestFinished of a worker    attempt current and live,                  ended
                                   output_tokens == next_index
    RequestFinished of control     open                                       ended, usage is what was counted
    anything else, or after        never                                      nothing

A `CancelRequested` with the reason `unanswered` that comes after the end does not count either, but obliges
control to correct the charge: the client received an error in place of the answer.
"""

from collections.abc import Callable
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from events.schema import (
    AttemptReleased,
    AttemptStarted,
    CancelReason,
    CancelRequested,
    FinishReason,
    Problem,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)

Phase = Literal["none", "open", "ended"]
Ender = Literal["worker", "control", "fold"]

GRACEFUL = frozenset({"draining", "host"})


class Life(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one request. `counted` is the number of its events that counted.

    `next_index` is the number of output tokens that count; `deaths` is the number of attempts that another
    attempt followed without an orderly release; `seen` holds every attempt id ever started, so that a
    repeated start does not count.
    """

    phase: Phase = "none"
    attempt: str | None = None
    live: bool = False
    next_index: int = 0
    prompt_tokens: int = 0
    attempts: int = 0
    deaths: int = 0
    released: str | None = None
    wanted: CancelReason | None = None
    seen: frozenset[str] = frozenset()
    counted: int = 0
    reason: FinishReason | None = None
    ender: Ender | None = None
    error: Problem | None = None


NEW = Life()


def advance(life: Life, event: Any) -> Life:
    """Return the life after `event`. The event counted exactly if `counted` grew."""
    rule = RULES.get(type(event))
    if rule is None or life.phase == "ended":
        return life
    return rule(life, event)


def deaths(life: Life) -> int:
    """Count the attempts that ended without a release, including the last if a new one started now."""
    return life.deaths + (life.attempt is not None and life.released not in GRACEFUL)


def cancelled_as(why: CancelReason) -> FinishReason:
    """Return the reason with which a request ends after a cancel for `why` has taken effect."""
    return "revoked" if why == "revoked" else "cancelled"


def _accepted(life: Life, event: RequestAccepted) -> Life:
    if life.phase != "none":
        return life
    return replace(life, phase="open", counted=life.counted + 1)


def _started(life: Life, event: AttemptStarted) -> Life:
    if life.phase != "open" or event.attempt in life.seen:
        return life
    seen = life.seen | {event.attempt}
    if event.after != life.attempt or event.resume_index != life.next_index:
        return replace(life, seen=seen)
    return replace(
        life,
        attempt=event.attempt,
        live=True,
        prompt_tokens=life.prompt_tokens if life.attempts else event.prompt_tokens,
        attempts=life.attempts + 1,
        deaths=deaths(life),
        released=None,
        seen=seen,
        counted=life.counted + 1,
    )


def _generated(life: Life, event: TokensGenerated) -> Life:
    if not _is_current(life, event.attempt) or event.index != life.next_index:
        return life
    return replace(life, next_index=life.next_index + len(event.token_ids), counted=life.counted + 1)


def _released(life: Life, event: AttemptReleased) -> Life:
    if not _is_current(life, event.attempt):
        return life
    if life.wanted is not None:
        return _end(life, cancelled_as(life.wanted), "fold")
    return replace(life, live=False, released=event.why, counted=life.counted + 1)


def _cancelled(life: Life, event: CancelRequested) -> Life:
    if life.phase != "open" or event.attempt is not None or life.wanted is not None:
        return life
    wanted = replace(life, wanted=event.why)
    if life.live:
        return replace(wanted, counted=life.counted + 1)
    return _end(wanted, cancelled_as(event.why), "fold")


def _finished(life: Life, event: RequestFinished) -> Life:
    if life.phase != "open":
        return life
    if event.attempt is None:
        return _end(life, event.reason, "control", event.error)
    if not _is_current(life, event.attempt) or event.output_tokens != life.next_index:
        return life
    return _end(life, event.reason, "worker", event.error)


def _is_current(life: Life, attempt: str) -> bool:
    return life.phase == "open" and life.live and life.attempt == attempt


def _end(life: Life, reason: FinishReason, ender: Ender, error: Problem | None = None) -> Life:
    return replace(
        life,
        phase="ended",
        live=False,
        reason=reason,
        ender=ender,
        error=error,
        counted=life.counted + 1,
    )


RULES: dict[type, Callable[[Life, Any], Life]] = {
    RequestAccepted: _accepted,
    AttemptStarted: _started,
    TokensGenerated: _generated,
    AttemptReleased: _released,
    CancelRequested: _cancelled,
    RequestFinished: _finished,
}
