"""Closing a period: its invoices become final, up to what is projected and archived, by one event."""

import datetime
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import msgspec
from anyio import to_thread

from events import codec, subjects
from events.contracts import SECOND_NS
from events.log import Conflict, Log
from events.schema import PeriodClosed
from replay.billing import invoice
from replay.billing.invoice import Closing
from replay.warehouse.warehouse import Warehouse
from rift.rpc import QuestionRefused

WRITER = "control"

# A charge of the period that was stored while it was sealed is sealed with the next try. After the month is
# over that is a clock that stepped back, which does not happen three times within a second.
TRIES = 3


class SealedMonth(msgspec.Struct, frozen=True):
    """Up to where each stream is archived, and the SHA-256 of the manifest that ends there."""

    positions: dict[str, int]
    roots: dict[str, str]


async def close(
    log: Log,
    period: str,
    *,
    streams: Iterable[str],
    warehouse: Callable[[], Warehouse],
    catch_up: Callable[[], Awaitable[object]],
    seal: Callable[[], Awaitable[SealedMonth]],
) -> dict[str, Any]:
    """Close a period and return what it came to. Raises QuestionRefused, BillingRefused, LogError."""
    invoice.checked_period(period)
    ends = {stream: await log.last_sequence(stream) for stream in streams}
    await catch_up()
    await to_thread.run_sync(_check, warehouse(), period, ends)
    for _ in range(TRIES):
        sealed = await seal()
        await catch_up()
        found = await to_thread.run_sync(_closing, warehouse(), period, sealed)
        if found is not None:
            break
    else:
        raise QuestionRefused(f"{period} still grows; try again")
    event = PeriodClosed(
        id=f"period.{period}",
        period=period,
        positions=sealed.positions,
        roots=sealed.roots,
        digest=found.digest,
    )
    subject = subjects.book("period", period)
    try:
        await log.append(subjects.BOOK, subject, codec.encode(WRITER, [event]), expect_last=0)
    except Conflict as error:
        raise QuestionRefused(f"{period} was closed meanwhile, and stays as it is") from error
    await catch_up()
    return {
        "period": period,
        "accounts": found.accounts,
        "total_nanousd": found.total_nanousd,
        "digest": event.digest,
        "positions": event.positions,
        "roots": event.roots,
    }


def _check(warehouse: Warehouse, period: str, ends: Mapping[str, int]) -> None:
    """Raise QuestionRefused unless the period is over, all that was stored (`ends`) is folded, and every
    period before it with a charge is closed."""
    applied = warehouse.positions()
    for stream, end in ends.items():
        if applied.get(stream, 0) < end:
            raise QuestionRefused(
                f"{stream} is folded up to {applied.get(stream, 0)} of {end}, and may hold more of {period}: "
                "try again; relation `lag` says what holds it up"
            )
    now, first, closed, before = warehouse.read(
        ("select max(stored_at_ns) from lag", []),
        ("select min(at_ns) from facts.book_entries", []),
        ("select closed_at_ns from periods where period = ?", [period]),
        ("select min(period) from invoice_lines where period < ? and status = 'open'", [period]),
    )
    if closed.rows:
        raise QuestionRefused(f"{period} is closed, and stays as it is; correct it with `rift correct`")
    if (now_ns := now.rows[0][0] or 0) < end_ns(period):
        raise QuestionRefused(f"{period} is not over: the last record was stored {_moment(now_ns)}")
    if (first.rows[0][0] or 0) >= end_ns(period):
        raise QuestionRefused(f"{period} was over before anything was stored here")
    if (earlier := before.rows[0][0]) is not None:
        raise QuestionRefused(f"{earlier} has charges and is open; close it first")


def _closing(warehouse: Warehouse, period: str, sealed: SealedMonth) -> Closing | None:
    """Return what the period comes to, or None if it holds what was not sealed, or not all that was."""
    applied = warehouse.positions()
    if any(applied.get(stream, 0) < sequence for stream, sequence in sealed.positions.items()):
        return None
    select = "select stream, max(sequence) from charges where period = ? group by stream"
    [last] = warehouse.read((select, [period]))
    if any(sequence > sealed.positions.get(stream, 0) for stream, sequence in last.rows):
        return None
    return invoice.closing(warehouse.read, period)


def end_ns(period: str) -> int:
    """Return the first instant after the period, Unix nanoseconds."""
    year, month = map(int, period.split("-"))
    after = datetime.datetime(year + month // 12, month % 12 + 1, 1, tzinfo=datetime.UTC)
    return int(after.timestamp()) * SECOND_NS


def _moment(at_ns: int) -> str:
    moment = datetime.datetime.fromtimestamp(at_ns // SECOND_NS, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
