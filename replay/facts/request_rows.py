"""One request under way: how each event that counted changes its rows, and what its end leaves.

What counts was decided before (`events.lives`); what it costs is decided by `events.charge`.
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

# An attempt that ended so had the last word itself: until then it was running. Any other was cut
# off by somebody else, and ran for sure only until its own last event.
OWN_ENDS = frozenset({"finished", "draining", "host"})

# Between two of a request's token events, in milliseconds: the upper bounds of `itl_counts`, the last count
# being of what is longer. No bound is more than 1.5 times the one before, up to a second.
ITL_BOUNDS_MS = (
    *(1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
    *(2048, 4096, 8192),
)
ITL_BOUNDS_NS = tuple(bound * 1_000_000 for bound in ITL_BOUNDS_MS)


class EventOrigin(msgspec.Struct, frozen=True):
    """Where and when one event stands."""

    stream: str
    sequence: int
    index: int
    at_ns: int

    @property
    def position(self) -> str:
        return f"{self.stream}:{self.sequence}.{self.index}"


class Open(msgspec.Struct):
    """A request under way: its row so far, and the row of its current attempt while that is live."""

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
        accepted_at_ns=origin.at_ns,
        accepted_sequence=origin.sequence,
        accepted_position=origin.position,
    )


def note(under_way: Open, event: Any, origin: EventOrigin, life: Life) -> Iterator[Row]:
    """Enter one counted event into the rows under way; yield the attempt it closed, if it did."""
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
        assert row.last_token_at_ns is not None, "who has first tokens has last ones"
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
    """Yield the rows of a request that ended: what is left of its attempt, and its own with its charge."""
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
    """Whether the billing facts a terminal event repeats are not the acceptance's, which are the truth."""
    return (
        event.account not in (None, row.account)
        or event.model not in (None, row.model)
        or event.price_version not in (None, row.price_version)
    )
