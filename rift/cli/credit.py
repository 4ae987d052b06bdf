"""Prepaid credit: `rift credit grant`, `rift credit list`."""

import json
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from events import book as books
from events import credit, subjects
from events.book import Book
from events.jetstream import JetStream
from events.log import Log
from events.money import nanousd
from events.schema import CreditGranted
from rift import book_admin
from rift.cli.arguments import Commands, add_account, add_command, add_entry_id, add_group
from rift.cli.connection import with_log
from rift.cli.output import CommandFailed, Formats, money, print_list

AMOUNTS = ("budget", "granted", "held", "spent", "corrected", "available")


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    actions = add_group(commands, "credit", "grant and list prepaid credit")
    add = add_command(actions, "grant", grant, "add prepaid credit to an account")
    add_account(add)
    add.add_argument("--usd", required=True, metavar="AMOUNT", help="amount in USD, like 10.50")
    add.add_argument("--reason", default="", metavar="TEXT", help="why; stored in the book")
    add_entry_id(add)
    add_command(actions, "list", show, "list what each account was granted, holds and has spent")


def grant(options: Namespace) -> None:
    amount = nanousd(options.usd)
    if amount <= 0:
        raise CommandFailed(
            f"--usd: must be greater than 0, got {options.usd}; to take money back, use `rift correct`"
        )

    entry = book_admin.entry_id("grant", options.account, options.id)
    granted = CreditGranted(id=entry, account=options.account, nanousd=amount, reason=options.reason)

    async def add(log: JetStream) -> bool:
        return await book_admin.add(log, await books.read(log), granted)

    if not with_log(options, add):
        raise CommandFailed(f"the book already has {entry}, and an id counts once: nothing was added")
    if options.json:
        print(json.dumps({"account": options.account, "nanousd": amount}))
    else:
        print(
            f"credit added to account {options.account}; `rift credit list` shows the balance",
            file=sys.stderr,
        )


def show(options: Namespace) -> None:
    async def read(log: JetStream) -> list[dict[str, Any]]:
        book = await books.read(log)
        month = await current_month(log, book)
        return [_line(book, account, month) for account in sorted(book.accounts)]

    formats: Formats = {f"{name}_nanousd": money for name in AMOUNTS}
    print_list(with_log(options, read), as_json=options.json, formats=formats)


async def current_month(log: Log, book: Book) -> str:
    """Return the month of the log's last record, which is the one that budgets apply to."""
    times_ns = [await _last_ns(log, shard=shard) for shard in range(book.shards)]
    return credit.month_of(max(book.at_ns, *times_ns))


def _line(book: Book, account: str, month: str) -> dict[str, Any]:
    standing = book.credits.of(account)
    return {
        "account": account,
        "plan": standing.plan,
        "budget_nanousd": standing.budget_nanousd,
        "granted_nanousd": standing.granted_nanousd,
        "held_nanousd": standing.held_nanousd,
        "spent_nanousd": standing.spent_nanousd,
        "corrected_nanousd": standing.corrected_nanousd,
        "available_nanousd": standing.room(month),
    }


async def _last_ns(log: Log, *, shard: int) -> int:
    """Return when a shard's last record was stored, or 0 if it has none."""
    stream = subjects.shard_stream(shard)
    last_ns = 0
    last = await log.last_sequence(stream)
    async for batch in log.scan(stream, [subjects.of_shard(shard)], first=last, target=last):
        last_ns = max(last_ns, *(stored.stored_at_ns for stored in batch))
    return last_ns
