"""The rows of one open request: each event that counts changes them, and its end completes them.

`events.request_states` decides which events count and `events.pricing` computes the charge.
"""

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import msgspec

from events import schema
from events.lifecycle import Life
from events.pricing import billed, cost_nanousd
from events.schema import Price
from replay.facts.rows import AttemptRow, RequestRow, Row

STATES: dict[str | None, str] = {
    "stop": "finished",
    "length": "finished",
    "tool_calls": "finished",
    "cancelled": "cancelled",
    "revoked": "cancelled",
    "expired": "expired",
    "failed": "failed",
    "invalid": "invalid",
    "poison": "poison",
}

# An attempt with one of these outcomes ended by its own event, so it ran until then. Any other attempt was
# ended by another process and is known to have run only until its own last event.
OWN_ENDS = frozenset({"finished", "draining", "host"})

# Upper bounds of the buckets of `itl_counts`, the gaps between token events, in milliseconds; the last bucket
# has none. Up to a second, a bound is at most 1.5 times the one before it (2 below 2 ms).
ITL_BOUNDS_MS = (
    *(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
    *(2048, 4096, 8192),
)
ITL_BOUNDS_NS = tuple(bound * 1_000_000 for bound in ITL_BOUNDS_MS)


class EventOrigin(msgspec.Struct, frozen=True):
    """The place of an event in the log, and its stored time."""

    stream: str
    sequence: int
    index: int
    at_ns: int

    @property
    def position(self) -> str:
        return f"{self.stream}:{self.sequence}.{self.index}"


class Open(msgspec.Struct):
    """An open request: its row so far, and the row of its live attempt."""

    row: RequestRow
    price: Price
    attempt: AttemptRow | None = None


def accepted_row(event: schema.RequestAccepted, origin: EventOrigin) -> RequestRow:
    return RequestRow(
        request_id=event.request,
        account=event.account,
        key=event.key,
        model=event.model,
        kind=event.kind,
        plan=event.plan,
        price_version=event.price_version,
        stream=event.stream,
        group_id=event.group,
        choice=event.choice,
        allowance=event.allowance,
        client_request_id=event.client_request_id,
        traceparent=event.traceparent,
        tracestate=event.tracestate,
        admission_ns=event.admission_ns,
        accepted_at_ns=origin.at_ns,
        accepted_sequence=origin.sequence,
        accepted_position=origin.position,
    )


def note(under_way: Open, event: Any, origin: EventOrigin, life: Life) -> Iterator[Row]:
    """Apply one counted event to the open rows; yield the attempt if the event closed it."""
    row = under_way.row
    attempt = under_way.attempt
    match event:
        case schema.AttemptStarted():
            if attempt is not None:
                yield _closed(under_way, "superseded", origin)
            under_way.attempt = _attempt_row(event, row, life, origin)
            row.simulated = row.simulated or event.simulated
            if row.started_at_ns is None:
                row.started_at_ns = origin.at_ns
        case schema.TokensGenerated():
            assert attempt is not None, "tokens count for a live attempt only"
            _tokens(row, attempt, event, origin)
        case schema.AttemptReleased():
            yield _closed(under_way, event.why, origin)
    row.state = ("running" if life.live else "queued") if life.phase == "open" else STATES[life.reason]
    row.prompt_tokens = life.prompt_tokens
    row.output_tokens = life.next_index
    row.attempts = life.attempts
    row.deaths = life.deaths
    row.events = life.counted
    row.cancel_reason = life.wanted


def _attempt_row(
    event: schema.AttemptStarted, row: RequestRow, life: Life, origin: EventOrigin
) -> AttemptRow:
    return AttemptRow(
        attempt_id=event.attempt,
        request_id=row.request_id,
        model=row.model,
        number=life.attempts,
        worker=event.worker,
        engine=event.engine,
        model_digest=event.model_digest,
        simulated=event.simulated,
        resume_index=event.resume_index,
        started_at_ns=origin.at_ns,
        last_event_at_ns=origin.at_ns,
        started_position=origin.position,
    )


def _tokens(row: RequestRow, attempt: AttemptRow, event: schema.TokensGenerated, origin: EventOrigin) -> None:
    if row.first_token_at_ns is None:
        row.first_token_at_ns = origin.at_ns
        row.cached_tokens = event.cached_tokens
    else:
        assert row.last_token_at_ns is not None, "a request with first tokens has last ones"
        if row.itl_counts is None:
            row.itl_counts = [0] * (len(ITL_BOUNDS_NS) + 1)
        row.itl_counts[bisect_right(ITL_BOUNDS_NS, origin.at_ns - row.last_token_at_ns)] += 1
    if attempt.first_token_at_ns is None:
        attempt.first_token_at_ns = origin.at_ns
        attempt.cached_tokens = event.cached_tokens
    row.last_token_at_ns = attempt.last_event_at_ns = origin.at_ns
    attempt.output_tokens += len(event.token_ids)


def _closed(under_way: Open, outcome: str, origin: EventOrigin) -> AttemptRow:
    attempt = under_way.attempt
    under_way.attempt = None
    assert attempt is not None, "only a live attempt can be closed"
    attempt.outcome = outcome
    attempt.ended_at_ns = origin.at_ns
    if outcome in OWN_ENDS:
        attempt.last_event_at_ns = origin.at_ns
    return attempt


def settle(
    under_way: Open, event: Any, origin: EventOrigin, life: Life, *, with_prompt: bool
) -> Iterator[AttemptRow | RequestRow]:
    """Yield the final rows of a request that ended: its live attempt, and the request with its charge."""
    row = under_way.row
    if under_way.attempt is not None:
        yield _closed(under_way, "finished" if life.ender == "worker" else "ended", origin)
    row.finish_reason = life.reason
    row.ended_by = life.ender
    row.error_code = life.error.code if life.error is not None else None
    row.finished_at_ns = origin.at_ns
    row.finished_position = origin.position
    row.finished_sequence = origin.sequence
    row.finished_index = origin.index
    row.finish_differs = isinstance(event, schema.RequestFinished) and _differs(event, row)
    tokens = billed(life, under_way.price, cached_tokens=row.cached_tokens, with_prompt=with_prompt)
    row.billed_prompt_tokens = tokens.prompt_tokens
    row.billed_cached_tokens = tokens.cached_tokens
    row.billed_output_tokens = tokens.output_tokens
    if row.plan == "per_token":
        row.charge_nanousd = cost_nanousd(tokens, under_way.price)
    yield row


def _differs(event: schema.RequestFinished, row: RequestRow) -> bool:
    """Return whether a terminal event repeats billing facts that differ from the acceptance, which counts."""
    return (
        event.account not in (None, row.account)
        or event.model not in (None, row.model)
        or event.price_version not in (None, row.price_version)
    )
