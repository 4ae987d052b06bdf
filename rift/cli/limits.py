"""Limits of accounts and keys: `rift limits set`, `rift limits list`."""

import json
import sys
from argparse import Namespace
from typing import Any

from events import book as books
from events.book import Book
from events.jetstream import JetStream
from events.money import nanousd
from rift import book_admin
from rift.cli.output import CommandFailed, list_of, money, with_log

# What can be limited, as the book's events name it; the last three are an account's alone.
RATES = ("requests_per_minute", "tokens_per_minute", "concurrent")
OF_ACCOUNT = ("queue_share_percent", "budget_nanousd", "plan")
COUNT_MAX = 2**53


def change(options: Namespace) -> None:
    changed = _changed(options)
    if not changed:
        raise CommandFailed("nothing to set: name --budget, --plan, --concurrent or another limit")
    if options.key and (wrong := [name for name in OF_ACCOUNT if name in changed]):
        what = wrong[0].removesuffix("_nanousd").removesuffix("_percent").replace("_", "-")
        raise CommandFailed(f"--{what} is an account's, not a key's; leave --key out to set it")

    async def write(log: JetStream) -> None:
        book = await books.read(log)
        if options.key:
            await book_admin.set_key_limits(log, book, options.account, options.key, changed)
        else:
            await book_admin.set_limits(log, book, options.account, changed)

    with_log(options, write)
    if options.json:
        print(json.dumps({"account": options.account, "key": options.key}))
    else:
        print(f"stored for account {options.account}; `rift limits list` shows it", file=sys.stderr)


def show(options: Namespace) -> None:
    async def read(log: JetStream) -> list[dict[str, Any]]:
        return _lines(await books.read(log))

    list_of(with_log(options, read), as_json=options.json, shown={"budget_nanousd": money})


def _changed(options: Namespace) -> dict[str, Any]:
    """Return what is named, `none` as None."""
    changed: dict[str, Any] = {}
    if options.plan is not None:
        changed["plan"] = options.plan
    for name in RATES:
        if (text := getattr(options, name)) is not None:
            changed[name] = _number(text, f"--{name.replace('_', '-')}", COUNT_MAX)
    if options.queue_share is not None:
        changed["queue_share_percent"] = _number(options.queue_share, "--queue-share", 100)
    if options.budget is not None:
        changed["budget_nanousd"] = _budget(options.budget)
    return changed


def _number(text: str, option: str, most: int) -> int | None:
    if text == "none":
        return None
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= most:
        raise CommandFailed(f"{option}: {text!r} is no limit; write a number from 1 to {most}, or none")
    return int(text)


def _budget(text: str) -> int | None:
    budget = None if text == "none" else nanousd(text)
    if budget is not None and budget < 0:
        raise CommandFailed(f"{text} is no budget; 0 stops an account, none lets it spend")
    return budget


def _lines(book: Book) -> list[dict[str, Any]]:
    """A line for each account, and one for each key of it that has limits of its own."""
    lines = []
    for account in sorted(book.accounts):
        limits = book.limits.get(account)
        line: dict[str, Any] = {"account": account, "key": None, "plan": book.credits.of(account).plan}
        for name in (*RATES, *OF_ACCOUNT[:-1]):
            line[name] = getattr(limits, name, None)
        lines.append(line)
        for key, held in book.keys.items():
            if held.event.account == account and held.limits is not None and held.revoked_at_ns is None:
                of_key = {name: getattr(held.limits, name, None) for name in line}
                lines.append(of_key | {"account": account, "key": key})
    return lines
