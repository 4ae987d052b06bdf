"""Prepaid credit and budgets: `rift credit grant`, `rift credit list`."""

import json
import sys
from argparse import Namespace
from typing import Any

from events import book as books
from events import credit, subjects
from events.book import Book
from events.jetstream import JetStream
from events.log import Log
from events.money import nanousd
from events.schema import CreditGranted
from rift import book_admin
from rift.cli.output import CommandFailed, Shown, list_of, money, with_log

MONEY = ("budget", "granted", "held", "spent", "available")


def grant(options: Namespace) -> None:
    amount = nanousd(options.usd)
    if amount <= 0:
        raise CommandFailed(
            f"{options.usd} is no credit; grant more than 0, or `rift correct` what was charged"
        )

    entry = book_admin.entry_id("grant", options.account, options.id)
    granted = CreditGranted(id=entry, account=options.account, nanousd=amount, reason=options.reason)

    async def add(log: JetStream) -> bool:
        return await book_admin.add(log, await books.read(log), granted)

    if not with_log(options, add):
        raise CommandFailed(f"the book has {entry} already, and it counts once: nothing was added")
    if options.json:
        print(json.dumps({"account": options.account, "nanousd": amount}))
    else:
        print(f"stored for account {options.account}; `rift credit list` shows it", file=sys.stderr)


def show(options: Namespace) -> None:
    """Show what the book says; what is available of a budget is of the month of the log's last record."""

    async def read(log: JetStream) -> list[dict[str, Any]]:
        book = await books.read(log)
        month = await month_now(log, book)
        return [_line(book, account, month) for account in sorted(book.accounts)]

    shown: Shown = {f"{name}_nanousd": money for name in MONEY}
    list_of(with_log(options, read), as_json=options.json, shown=shown)


async def month_now(log: Log, book: Book) -> str:
    """Return the month of the log's last record."""
    return credit.month_of(max(book.at_ns, await _last_ns(log, shard=0)))


def _line(book: Book, account: str, month: str) -> dict[str, Any]:
    standing = book.credits.of(account)
    return {
        "account": account,
        "plan": standing.plan,
        "budget_nanousd": standing.budget_nanousd,
        "granted_nanousd": standing.granted_nanousd,
        "held_nanousd": standing.held_nanousd,
        "spent_nanousd": standing.spent_nanousd,
        "available_nanousd": standing.room(month),
    }


async def _last_ns(log: Log, *, shard: int) -> int:
    """Return when a shard's last record was stored; 0: it has none."""
    stream = subjects.shard_stream(shard)
    last_ns = 0
    last = await log.last_sequence(stream)
    async for batch in log.scan(stream, [f"rift.{shard}.>"], first=last, target=last):
        last_ns = max(last_ns, *(stored.stored_at_ns for stored in batch))
    return last_ns
