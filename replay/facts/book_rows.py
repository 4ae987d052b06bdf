"""Events of the book to rows, each independent of the others.

Rules across events, such as "only the first close of a period counts", are in `fold.py`.
"""

from collections.abc import Iterator, Sequence

import msgspec

from events import schema
from events.book import prices_by_model
from replay.facts.request_rows import EventOrigin
from replay.facts.rows import (
    AccountRow,
    CorrectionRow,
    GrantRow,
    HoldRow,
    KeyRow,
    LimitsRow,
    PeriodRow,
    PeriodStreamRow,
    PriceRow,
    QuarantineRow,
    RevocationRow,
    Row,
    SegmentRow,
    SettlementRow,
)


def entry_rows(event: schema.BookEvent, origin: EventOrigin) -> Iterator[Row]:
    position = origin.position
    at_ns = origin.at_ns
    match event:
        case schema.AccountOpened():
            yield AccountRow(event.account, position, at_ns)
        case schema.KeyIssued():
            models = None if event.models is None else list(event.models)
            yield KeyRow(
                event.key, event.account, list(event.scopes), models, event.expires_at_ns, position, at_ns
            )
        case schema.KeyRevoked():
            yield RevocationRow(event.key, event.account, position, at_ns)
        case schema.LimitsSet():
            more = event.plan, event.budget_nanousd, *_rates(event), event.queue_share_percent
            yield LimitsRow(event.account, None, *more, position, at_ns)
        case schema.KeyLimitsSet():
            yield LimitsRow(event.account, event.key, None, None, *_rates(event), None, position, at_ns)
        case schema.CreditGranted():
            yield GrantRow(event.account, event.nanousd, event.reason, position, at_ns)
        case schema.CreditHeld():
            yield HoldRow(event.id, event.account, event.shard, event.lane, event.nanousd, position, at_ns)
        case schema.CreditSettled():
            yield SettlementRow(event.account, event.hold, event.nanousd, position, at_ns)
        case schema.UsageCorrected():
            yield CorrectionRow(
                event.account,
                event.model or "",
                event.request,
                event.nanousd,
                event.reason,
                position,
                origin.sequence,
                origin.index,
                at_ns,
            )
        case schema.PeriodClosed():
            yield _period(event, position, at_ns)
            for stream, sequence in sorted(event.positions.items()):
                yield PeriodStreamRow(event.period, stream, sequence)
        case schema.RecordQuarantined():
            yield QuarantineRow(event.stream, event.sequence, event.reason, position, at_ns)
        case schema.SegmentSealed():
            yield SegmentRow(event.stream, event.first, event.last, event.manifest, position, at_ns)


def price_rows(event: schema.PricePublished, origin: EventOrigin, *, last_version: int) -> Sequence[PriceRow]:
    """Return the prices of a list that counts after `last_version`, none of one that does not."""
    return [
        PriceRow(
            event.version,
            price.model,
            price.prompt_nanousd,
            price.output_nanousd,
            price.cached_prompt_nanousd,
            price.second_nanousd,
            origin.position,
            origin.at_ns,
        )
        for price in prices_by_model(event, last_version=last_version).values()
    ]


def _rates(event: schema.Limits) -> tuple[int | None, int | None, int | None]:
    return event.requests_per_minute, event.tokens_per_minute, event.concurrent


def _period(event: schema.PeriodClosed, position: str, at_ns: int) -> PeriodRow:
    return PeriodRow(
        event.period,
        _json(event.positions),
        _json(event.roots),
        event.digest,
        event.rules,
        position,
        at_ns,
    )


def _json(value: object) -> str:
    return msgspec.json.encode(value, order="sorted").decode()
