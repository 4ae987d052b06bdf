"""Close a period: one event makes its invoices final, up to the positions that are projected and archived."""

import datetime
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import msgspec

from events.contracts import SECOND_NS
from events.log import Conflict, Log
from events.publisher import Publisher
from events.schema import PeriodClosed
from replay.archive.signatures import SigningKey, signed
from replay.billing import invoice
from replay.billing.invoice import Closing
from replay.warehouse.warehouse import Warehouse
from rift.control.projection.warehouse_host import Projection
from rift.rpc import QuestionRefused

WRITER = "control"

# A charge of the period that is stored during a try is archived by the next one. Once the month is over this
# needs a clock that steps back, which does not happen three times within a second.
TRIES = 3


class ArchivedEnds(msgspec.Struct, frozen=True):
    """How far each stream is archived, and the SHA-256 of the manifest that ends there."""

    positions: dict[str, int]
    roots: dict[str, str]


async def close(
    log: Log,
    period: str,
    projection: Projection,
    archive_now: Callable[[], Awaitable[ArchivedEnds]],
    signing_key: SigningKey | None = None,
) -> dict[str, Any]:
    """Close a period, signed if there is a key, and return its totals.

    Raises QuestionRefused, BillingRefused, LogError.
    """
    invoice.checked_period(period)
    ends = {stream: await log.last_sequence(stream) for stream in projection.streams}
    await projection.read(lambda warehouse: _check(warehouse, period, ends))
    for _ in range(TRIES):
        archived = await archive_now()
        closing = await projection.read(partial(_closing, period=period, archived=archived))
        if closing is not None:
            break
    else:
        raise QuestionRefused(f"{period} is still growing; try again")
    event = PeriodClosed(
        id=f"period.{period}",
        period=period,
        positions=archived.positions,
        roots=archived.roots,
        digest=closing.digest,
        rules=invoice.RULES,
    )
    try:
        await Publisher(log, WRITER).publish_at(signed(event, signing_key), expect_last=0)
    except Conflict as error:
        raise QuestionRefused(f"{period} was closed meanwhile, and stays as it is") from error
    await projection.catch_up()
    return {
        "period": period,
        "accounts": closing.accounts,
        "total_nanousd": closing.total_nanousd,
        "digest": event.digest,
        "positions": event.positions,
        "roots": event.roots,
    }


def _check(warehouse: Warehouse, period: str, ends: Mapping[str, int]) -> None:
    """Raise QuestionRefused unless the period is over, everything up to `ends` is projected, and each earlier
    period with a charge is closed."""
    applied = warehouse.positions()
    for stream, end in ends.items():
        if applied.get(stream, 0) < end:
            raise QuestionRefused(
                f"{stream} is projected up to {applied.get(stream, 0)} of {end}, and may hold more of "
                f"{period}: try again; relation `lag` shows what delays it"
            )
    newest, oldest, closed, earlier = warehouse.read(
        ("select max(stored_at_ns) from lag", []),
        ("select min(at_ns) from facts.book_entries", []),
        ("select closed_at_ns from periods where period = ?", [period]),
        ("select min(period) from invoice_lines where period < ? and status = 'open'", [period]),
    )
    if closed.rows:
        raise QuestionRefused(f"{period} is closed, and stays as it is; correct it with `rift correct`")
    if (newest_ns := newest.rows[0][0] or 0) < end_ns(period):
        raise QuestionRefused(f"{period} is not over: the last record was stored {_utc(newest_ns)}")
    if (oldest.rows[0][0] or 0) >= end_ns(period):
        raise QuestionRefused(f"{period} was over before anything was stored here")
    if (open_period := earlier.rows[0][0]) is not None:
        raise QuestionRefused(f"{open_period} has charges and is open; close it first")


def _closing(warehouse: Warehouse, period: str, archived: ArchivedEnds) -> Closing | None:
    """Return the period's totals, or None if it holds a charge that is not archived or if an archived record
    is not projected."""
    applied = warehouse.positions()
    if any(applied.get(stream, 0) < sequence for stream, sequence in archived.positions.items()):
        return None
    select = "select stream, max(sequence) from charges where period = ? group by stream"
    [last] = warehouse.read((select, [period]))
    if any(sequence > archived.positions.get(stream, 0) for stream, sequence in last.rows):
        return None
    return invoice.closing(warehouse.read, period)


def end_ns(period: str) -> int:
    """Return the first instant after the period, Unix nanoseconds."""
    year, month = map(int, period.split("-"))
    end = datetime.datetime(year + month // 12, month % 12 + 1, 1, tzinfo=datetime.UTC)
    return int(end.timestamp()) * SECOND_NS


def _utc(at_ns: int) -> str:
    return f"{datetime.datetime.fromtimestamp(at_ns // SECOND_NS, datetime.UTC):%Y-%m-%d %H:%M:%S UTC}"
