"""Invoices and usage, read from the warehouse: whole numbers of nano-USD, each line traceable to the log.

What a line is made of is SQL (`sql/charges.sql`, `sql/invoice_lines.sql`). What lives here: how it is asked
for, and the forms it is shown in.
"""

import datetime
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from replay.errors import ReplayError
from replay.warehouse.result import QueryResult

Read = Callable[..., list[QueryResult]]
"""`Warehouse.read`: questions, answered as of one moment."""

PERIOD = re.compile(r"2[0-9]{3}-(0[1-9]|1[0-2])")
DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

GROUPS = ("day", "model", "key", "plan")
MEASURES = ("requests", "charged_requests", "prompt_tokens", "cached_tokens", "output_tokens")


class BillingRefused(ReplayError):
    """The question names something that is not there, or is not one; the message says what."""


class Line(msgspec.Struct, frozen=True):
    """The charges of one model, plan and price version. `digest` is over each of them, in log order."""

    model: str
    plan: str
    price_version: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    seconds: int
    nanousd: int
    requests: int
    positions: dict[str, str]
    digest: str


class Invoice(msgspec.Struct, frozen=True):
    """One account's period. `positions` is what it reaches of each stream: for good, if it is closed."""

    account: str
    period: str
    status: str
    lines: list[Line]
    total_nanousd: int
    positions: dict[str, int]


LINES = (
    "select account, model, plan, price_version, prompt_tokens, cached_tokens, output_tokens, seconds,"
    " nanousd, requests, first_position, last_position, digest from invoice_lines where period = ?{}"
    " order by account, model, plan, price_version"
)


def checked_period(period: str) -> str:
    if not PERIOD.fullmatch(period):
        raise BillingRefused(f"{period!r} is no period; write a month as YYYY-MM, like 2026-11")
    return period


def invoice(read: Read, account: str, period: str) -> Invoice:
    """Return an account's invoice of a period, provisional while that is open. Raises BillingRefused."""
    known, applied, closed, lines = read(
        ("select count(*) from accounts where account = ?", [account]),
        ("select stream, sequence from lag order by stream", []),
        ("select positions from periods where period = ?", [checked_period(period)]),
        (LINES.format(" and account = ?"), [period, account]),
    )
    if known.rows == [[0]]:
        raise BillingRefused(f"there is no account {account!r}")
    reached = msgspec.json.decode(closed.rows[0][0]) if closed.rows else dict(applied.rows)
    found = [_line(row) for row in lines.rows]
    status = "closed" if closed.rows else "open"
    return Invoice(account, period, status, found, sum(line.nanousd for line in found), reached)


class Closing(msgspec.Struct, frozen=True):
    """What a period comes to, over all accounts. `digest` is over every line of every invoice."""

    digest: str
    accounts: int
    total_nanousd: int


def closing(read: Read, period: str) -> Closing:
    """Return what a period comes to, as far as it is folded."""
    [lines] = read((LINES.format(""), [checked_period(period)]))
    by_account: dict[str, list[Line]] = {}
    for row in lines.rows:
        by_account.setdefault(row[0], []).append(_line(row))
    text = ""
    total = 0
    for account, found in by_account.items():
        owed = sum(line.nanousd for line in found)
        text += f"{account} {owed} {_digest(map(_line_text, found))}\n"
        total += owed
    return Closing(_digest([text]), len(by_account), total)


def usage(read: Read, account: str, first_day: str, last_day: str, groups: Sequence[str]) -> dict[str, Any]:
    """Return sums over days from the first to the last (UTC, inclusive), by groups. Raises BillingRefused."""
    for day in (first_day, last_day):
        _check_day(day)
    if unknown := [group for group in groups if group not in GROUPS]:
        raise BillingRefused(f"group_by: {unknown[0]!r} is no group; known are {', '.join(GROUPS)}")
    by = "".join(f"{group}, " for group in groups)
    sums = ", ".join(f"sum({name}) as {name}" for name in (*MEASURES, "charge_nanousd"))
    grouped = f" group by {by[:-2]} order by {by[:-2]}" if groups else " having count(*) > 0"
    known, found, applied = read(
        ("select count(*) from accounts where account = ?", [account]),
        (
            f"select {by}{sums} from usage where account = ? and day between ?::date and ?::date{grouped}",
            [account, first_day, last_day],
        ),
        ("select stream, sequence from lag order by stream", []),
    )
    if known.rows == [[0]]:
        raise BillingRefused(f"there is no account {account!r}")
    return {
        "object": "usage",
        "account": account,
        "from": first_day,
        "to": last_day,
        "group_by": list(groups),
        "data": [dict(zip(found.columns, row, strict=True)) for row in found.rows],
        "positions": dict(applied.rows),
    }


def _check_day(day: str) -> None:
    try:
        if DAY.fullmatch(day):
            datetime.date.fromisoformat(day)
            return
    except ValueError:
        # Of the right form, and in no calendar.
        pass
    raise BillingRefused(f"{day!r} is no day; write it as YYYY-MM-DD, in UTC")


def _line(row: Sequence[Any]) -> Line:
    told = dict(zip(Line.__struct_fields__, row[1:10], strict=False))
    return Line(**told, positions={"first": row[10], "last": row[11]}, digest=row[12])


def _line_text(line: Line) -> str:
    numbers = (line.price_version, line.prompt_tokens, line.cached_tokens, line.output_tokens, line.seconds)
    told = (line.model, line.plan, *numbers, line.nanousd, line.requests, line.digest)
    return " ".join(map(str, told)) + "\n"


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("".join(texts).encode()).hexdigest()
