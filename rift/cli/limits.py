"""Credit and limits of accounts: `rift credit grant`, `rift limits set`, `rift limits list`."""

import json
import sys
from argparse import Namespace
from typing import Any

from events import book as books
from events import credit, subjects
from events.book import Book
from events.jetstream import JetStream
from events.log import Log
from events.money import nanousd, usd
from events.schema import CreditGranted
from replay.answer import Answer
from rift import accounts
from rift.cli.ops import CommandFailed, table, with_log

COLUMNS = ("account", "plan", "budget", "granted", "held", "spent", "available")


def grant(options: Namespace) -> None:
    amount = nanousd(options.usd)
    if amount <= 0:
        raise CommandFailed(
            f"{options.usd} is no credit; grant more than 0, or `rift correct` what was charged"
        )

    entry = accounts.entry_id("grant", options.account, options.id)
    granted = CreditGranted(id=entry, account=options.account, nanousd=amount, reason=options.reason)

    async def add(log: JetStream) -> bool:
        return await accounts.add(log, await books.read(log), granted)

    if not with_log(options, add):
        raise CommandFailed(f"the book has {entry} already, and it counts once: nothing was added")
    _say(options, {"account": options.account, "nanousd": amount})


def change(options: Namespace) -> None:
    if options.budget is None and options.plan is None:
        raise CommandFailed("nothing to set: name --budget, --plan or both")
    budget = None if options.budget in (None, "none") else nanousd(options.budget)
    if budget is not None and budget < 0:
        raise CommandFailed(f"{options.budget} is no budget; 0 stops an account, none lets it spend")

    async def write(log: JetStream) -> None:
        await accounts.set_limits(
            log,
            await books.read(log),
            options.account,
            plan=options.plan,
            budget_nanousd=budget,
            keep_budget=options.budget is None,
        )

    with_log(options, write)
    _say(options, {"account": options.account})


def show(options: Namespace) -> None:
    """Show what the book says; what is available of a budget is of the month of the log's last record."""

    async def read(log: JetStream) -> list[dict[str, Any]]:
        book = await books.read(log)
        month = credit.month_of(max(book.at_ns, await _last_ns(log, shard=0)))
        return [_line(book, account, month) for account in sorted(book.accounts)]

    lines = with_log(options, read)
    if options.json:
        print(json.dumps(lines))
        return
    rows = [list(line.values())[:2] + [_usd(value) for value in list(line.values())[2:]] for line in lines]
    print(table(Answer(list(COLUMNS), rows)))


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
    stream, last_ns = subjects.shard_stream(shard), 0
    last = await log.last_sequence(stream)
    async for batch in log.scan(stream, [f"rift.{shard}.>"], first=last, target=last):
        last_ns = max(last_ns, *(stored.stored_at_ns for stored in batch))
    return last_ns


def _usd(amount: int | None) -> str | None:
    return None if amount is None else usd(amount)


def _say(options: Namespace, done: dict[str, Any]) -> None:
    if options.json:
        print(json.dumps(done))
    else:
        print(f"stored for account {options.account}; `rift limits list` shows it", file=sys.stderr)
