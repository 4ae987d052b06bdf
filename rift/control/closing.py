"""Closing a period: its invoices become final, up to what is projected and archived, by one event."""

import datetime
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from anyio import to_thread

from events import codec, subjects
from events.log import Conflict, Log
from events.schema import PeriodClosed
from replay import invoice
from replay.invoice import Closing
from replay.warehouse import Warehouse
from rift.questions import QuestionRefused

WRITER = "control"
NANOSECONDS = 1_000_000_000

# A charge of the period that was stored while it was sealed is sealed with the next try. After the month is
# over that is a clock that stepped back, which does not happen three times within a second.
TRIES = 3


class Sealed(msgspec.Struct, frozen=True):
    """Up to where each stream is archived, and the SHA-256 of the manifest that ends there."""

    positions: dict[str, int]
    roots: dict[str, str]


async def close(
    log: Log,
    period: str,
    *,
    warehouse: Callable[[], Warehouse],
    catch_up: Callable[[], Awaitable[None]],
    seal: Callable[[], Awaitable[Sealed]],
) -> dict[str, Any]:
    """Close a period and return what it came to. Raises QuestionRefused, BillingRefused, LogError."""
    await catch_up()
    await to_thread.run_sync(_check, warehouse(), invoice.checked_period(period))
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


def _check(warehouse: Warehouse, period: str) -> None:
    """Raise QuestionRefused unless the period is over, and every one before it with a charge is closed."""
    now, closed, before = warehouse.read(
        ("select max(stored_at_ns) from lag", []),
        ("select closed_at_ns from periods where period = ?", [period]),
        ("select min(period) from invoice_lines where period < ? and status = 'open'", [period]),
    )
    if closed.rows:
        raise QuestionRefused(f"{period} is closed, and stays as it is; correct it with `rift correct`")
    if (now_ns := now.rows[0][0] or 0) < end_ns(period):
        raise QuestionRefused(f"{period} is not over: the last record was stored {_moment(now_ns)}")
    if (earlier := before.rows[0][0]) is not None:
        raise QuestionRefused(f"{earlier} has charges and is open; close it first")


def _closing(warehouse: Warehouse, period: str, sealed: Sealed) -> Closing | None:
    """Return what the period comes to, or None if it holds what was not sealed."""
    select = "select stream, max(sequence) from charges where period = ? group by stream"
    [last] = warehouse.read((select, [period]))
    if any(sequence > sealed.positions.get(stream, 0) for stream, sequence in last.rows):
        return None
    return invoice.closing(warehouse.read, period)


def end_ns(period: str) -> int:
    """Return the first instant after the period, Unix nanoseconds."""
    year, month = map(int, period.split("-"))
    after = datetime.datetime(year + month // 12, month % 12 + 1, 1, tzinfo=datetime.UTC)
    return int(after.timestamp()) * NANOSECONDS


def _moment(at_ns: int) -> str:
    moment = datetime.datetime.fromtimestamp(at_ns // NANOSECONDS, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
