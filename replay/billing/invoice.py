"""Invoices and usage, read from the warehouse: whole numbers of nano-USD, each line traceable to the log.

This module runs the queries and shapes their results. The rules of a line are in SQL (`sql/charges.sql`,
`sql/invoice_lines.sql`).
"""

import datetime
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from events.money import usd
from replay.errors import ReplayError
from replay.sql_files import sql
from replay.warehouse.result import QueryResult

Read = Callable[..., list[QueryResult]]
"""`Warehouse.read`: answers several queries as of the same moment."""

PERIOD = re.compile(r"2[0-9]{3}-(0[1-9]|1[0-2])")
DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

# The version of the rules by which `invoice_lines.sql` bills an open month. A closed month keeps its own.
RULES = 2

GROUPS = ("hour", "day", "model", "key", "plan")
MEASURES = (
    *("requests", "charged_requests", "prompt_tokens", "cached_tokens", "output_tokens"),
    "charge_nanousd",
)
# About 3 MB of JSON. A year of hours has 8,760.
USAGE_ROWS_MAX = 10_000


class BillingRefused(ReplayError):
    """The request names something unknown or malformed; the message names it."""


class InvoiceLine(msgspec.Struct, frozen=True):
    """The charges of one model, plan and price version. `digest` covers each of them, in log order."""

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
    """One account's period. `positions` is by stream the last sequence included, final once closed."""

    account: str
    period: str
    status: str
    lines: list[InvoiceLine]
    total_nanousd: int
    positions: dict[str, int]


def checked_period(period: str) -> str:
    if not PERIOD.fullmatch(period):
        raise BillingRefused(f"{period!r} is not a period; write a month as YYYY-MM, like 2026-11")
    return period


def invoice(read: Read, account: str, period: str) -> Invoice:
    """Return an account's invoice of a period, provisional while that is open. Raises BillingRefused."""
    known, applied, closed, lines = read(
        ("select count(*) from accounts where account = ?", [account]),
        ("select stream, sequence from lag order by stream", []),
        ("select positions from periods where period = ?", [checked_period(period)]),
        (sql("billing/invoice_lines"), {"period": period, "account": account}),
    )
    if known.rows == [[0]]:
        raise BillingRefused(f"there is no account {account!r}")
    reached = msgspec.json.decode(closed.rows[0][0]) if closed.rows else dict(applied.rows)
    found = [_line(row) for row in lines.rows]
    status = "closed" if closed.rows else "open"
    return Invoice(account, period, status, found, sum(line.nanousd for line in found), reached)


def invoice_list(read: Read, account: str, limit: int, after: str | None) -> dict[str, Any]:
    """Return up to `limit` months with a charge, newest first, that are older than the month `after`.

    Raises BillingRefused.
    """
    if after is not None:
        checked_period(after)
    known, page = read(
        ("select count(*) from accounts where account = ?", [account]),
        (sql("billing/invoices"), {"account": account, "after": after, "limit": limit + 1}),
    )
    if known.rows == [[0]]:
        raise BillingRefused(f"there is no account {account!r}")
    data = [
        {
            "object": "invoice",
            "period": period,
            "status": status,
            "total_nanousd": total,
            "total_usd": usd(total),
        }
        for period, status, total in page.rows[:limit]
    ]
    return {"object": "list", "data": data, "has_more": len(page.rows) > limit}


class Closing(msgspec.Struct, frozen=True):
    """The total of a period over all accounts. `digest` covers every line of every invoice."""

    digest: str
    accounts: int
    total_nanousd: int


def closing(read: Read, period: str) -> Closing:
    """Return the totals of a period, as far as it is folded."""
    [lines] = read((sql("billing/invoice_lines"), {"period": checked_period(period), "account": None}))
    by_account: dict[str, list[InvoiceLine]] = {}
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
    _check_day("from", first_day)
    _check_day("to", last_day)
    if first_day > last_day:
        raise BillingRefused(f"from: {first_day!r} is after to: {last_day!r}; both days are inclusive")
    if repeated := [group for number, group in enumerate(groups) if group in groups[:number]]:
        raise BillingRefused(f"group_by: {repeated[0]!r} is named more than once")
    if unknown := [group for group in groups if group not in GROUPS]:
        raise BillingRefused(f"group_by: {unknown[0]!r} is not a group; use {', '.join(GROUPS)}")
    known, sums, applied = read(
        ("select count(*) from accounts where account = ?", [account]),
        (
            sql("billing/usage"),
            {
                "account": account,
                "first_day": first_day,
                "last_day": last_day,
                "groups": list(groups),
                "rows": USAGE_ROWS_MAX + 1,
            },
        ),
        ("select stream, sequence from lag order by stream", []),
    )
    if known.rows == [[0]]:
        raise BillingRefused(f"there is no account {account!r}")
    if len(sums.rows) > USAGE_ROWS_MAX:
        raise BillingRefused(
            f"group_by: {','.join(groups)} from {first_day} to {last_day} has more than {USAGE_ROWS_MAX} "
            "rows; ask for fewer days with from and to, or for fewer groups"
        )
    columns = (*groups, *MEASURES)
    rows = [dict(zip(sums.columns, row, strict=True)) for row in sums.rows]
    rows.sort(key=lambda row: [row[group] for group in groups])
    return {
        "object": "usage",
        "account": account,
        "from": first_day,
        "to": last_day,
        "group_by": list(groups),
        "data": [{column: row[column] for column in columns} for row in rows],
        "positions": dict(applied.rows),
    }


def _check_day(name: str, day: str) -> None:
    try:
        if DAY.fullmatch(day):
            datetime.date.fromisoformat(day)
            return
    except ValueError:
        # It has the right form, but the calendar does not have it.
        pass
    raise BillingRefused(f"{name}: {day!r} is not a day; write it as YYYY-MM-DD, in UTC")


def _line(row: Sequence[Any]) -> InvoiceLine:
    fields = dict(zip(InvoiceLine.__struct_fields__, row[1:10], strict=False))
    return InvoiceLine(**fields, positions={"first": row[10], "last": row[11]}, digest=row[12])


def _line_text(line: InvoiceLine) -> str:
    numbers = (line.price_version, line.prompt_tokens, line.cached_tokens, line.output_tokens, line.seconds)
    fields = (line.model, line.plan, *numbers, line.nanousd, line.requests, line.digest)
    return " ".join(map(str, fields)) + "\n"


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("".join(texts).encode()).hexdigest()
