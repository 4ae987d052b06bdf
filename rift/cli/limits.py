"""Limits of accounts and keys: `rift limits set`, `rift limits list`."""

import json
import re
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from events import book as books
from events.book import Book
from events.jetstream import JetStream
from events.money import nanousd
from rift import book_admin
from rift.cli.arguments import Commands, add_account, add_command, add_group
from rift.cli.connection import with_log
from rift.cli.output import CommandFailed, money, print_list

# The limits by their names in the book's events. The second group applies to accounts only.
RATES = ("requests_per_minute", "tokens_per_minute", "log_bytes_per_minute", "concurrent")
KEYS = ("idempotency_keys", "content_keys")
OF_ACCOUNT = (*KEYS, "queue_share_percent", "budget_nanousd", "plan")
COUNT_MAX = 2**53


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    actions = add_group(commands, "limits", "set and list rate limits, plans and budgets")
    change = add_command(
        actions, "set", set_limits, "set limits of an account or a key; limits not named stay unchanged"
    )
    add_account(change)
    change.add_argument(
        "--key", metavar="ID", help="limit only this key, in addition to its account's limits"
    )
    for name, text in (
        ("requests-per-minute", "requests accepted in any 60 s"),
        ("tokens-per-minute", "prompt and output tokens in any 60 s"),
        ("log-bytes-per-minute", "bytes stored in any 60 s (default: a share of the log)"),
        ("concurrent", "requests running or queued at once"),
    ):
        change.add_argument(f"--{name}", metavar="N", help=f"{text}, or none")
    for name, text in (
        ("idempotency-keys", "idempotency keys that the log holds"),
        ("content-keys", "keys of sealed content that the log holds"),
    ):
        help_text = f"{text}, or none (default: a share of the log)"
        change.add_argument(f"--{name}", metavar="N", help=help_text)
    change.add_argument(
        "--queue-share", metavar="PERCENT", help="share of a model's queue, or none (default: 33)"
    )
    change.add_argument("--budget", metavar="USD", help="most to spend per calendar month (UTC), or none")
    change.add_argument("--plan", choices=["per_token", "per_second"], help="unit that the account pays for")
    add_command(actions, "list", show, "list the limits of all accounts and keys")


def set_limits(options: Namespace) -> None:
    changed = _changed(options)
    if not changed:
        raise CommandFailed("nothing to set: name --budget, --plan, --concurrent or another limit")
    if options.key is not None and (invalid := [name for name in OF_ACCOUNT if name in changed]):
        option = invalid[0].removesuffix("_nanousd").removesuffix("_percent").replace("_", "-")
        raise CommandFailed(f"--{option} applies to accounts, not to keys; set it without --key")

    async def write(log: JetStream) -> Book:
        book = await books.read(log)
        if options.key is not None:
            await book_admin.set_key_limits(log, book, options.account, options.key, changed)
        else:
            await book_admin.set_limits(log, book, options.account, changed)
        return book

    book = with_log(options, write)
    if options.plan == "per_second" and all(price.second_nanousd is None for price in book.prices().values()):
        print(
            f"no model has a price per second, so every request of account {options.account} is refused "
            "until `rift prices publish` sets a second_usd",
            file=sys.stderr,
        )
    if options.json:
        print(json.dumps({"account": options.account, "key": options.key}))
    else:
        print(f"limits of account {options.account} set; `rift limits list` shows them", file=sys.stderr)


def show(options: Namespace) -> None:
    async def read(log: JetStream) -> list[dict[str, Any]]:
        return _lines(await books.read(log))

    print_list(with_log(options, read), as_json=options.json, formats={"budget_nanousd": money})


def _changed(options: Namespace) -> dict[str, Any]:
    """Return the limits that the options name; `none` becomes None."""
    changed: dict[str, Any] = {}
    if options.plan is not None:
        changed["plan"] = options.plan
    for name in (*RATES, *KEYS):
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
    # Longer texts are not read: Python refuses to convert thousands of digits.
    if not re.fullmatch("[0-9]{1,16}", text) or not 1 <= int(text) <= most:
        raise CommandFailed(f"{option}: must be a number from 1 to {most}, or none, got {text!r}")
    return int(text)


def _budget(text: str) -> int | None:
    budget = None if text == "none" else nanousd(text)
    if budget is not None and budget < 0:
        raise CommandFailed(
            f"--budget: must not be negative, got {text}; 0 stops all spending, none removes the budget"
        )
    return budget


def _lines(book: Book) -> list[dict[str, Any]]:
    """Return a line for each account, and one for each valid key that has limits."""
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
