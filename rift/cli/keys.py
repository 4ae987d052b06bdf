"""Accounts and API keys: `rift accounts list`, `rift keys create`, `rift keys list`, `rift keys revoke`."""

import json
import re
import sys
from argparse import ArgumentParser, Namespace
from datetime import UTC, datetime
from typing import Any

from events import book as books
from events.book import Book, HeldKey
from events.contracts import SECOND_NS
from events.jetstream import JetStream
from rift import book_admin, clock, keys
from rift.cli import arguments
from rift.cli.arguments import Commands, add_command, add_group
from rift.cli.connection import with_log
from rift.cli.credit import current_month
from rift.cli.output import CommandFailed, Formats, money, print_list, utc_time
from rift.keys import SCOPES, Key

UNIT_S = {"h": 3600, "d": 86_400}
# A century: a longer life is a typing mistake, or means no expiry.
LIFETIME_S_MAX = 100 * 366 * 86_400


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    accounts = add_group(commands, "accounts", "list accounts")
    add_command(accounts, "list", show_accounts, "list all accounts, their valid keys and available credit")
    actions = add_group(commands, "keys", "create, list and revoke API keys")
    new = add_command(actions, "create", create, "create a key and print it once")
    new.add_argument(
        "--account",
        required=True,
        type=arguments.account,
        help="account of the key, [a-z0-9-]{1,40}; opened if it is new",
    )
    new.add_argument(
        "--scopes",
        default="inference,usage",
        metavar="A,B",
        help="any of inference, usage, admin (default: inference,usage)",
    )
    new.add_argument("--models", metavar="A,B", help="models that the key may use (default: all)")
    new.add_argument(
        "--expires", metavar="WHEN", help="30d, 12h, or a date (its start, UTC) (default: never)"
    )
    listed = add_command(actions, "list", show, "list all keys, without their secrets")
    listed.add_argument("--account", type=arguments.account, metavar="NAME", help="only this account's keys")
    end = add_command(actions, "revoke", revoke, "revoke a key and cancel its running requests")
    end.add_argument("key", metavar="ID", help="the part of the key between its underscores")


def show_accounts(options: Namespace) -> None:
    async def read(log: JetStream) -> list[dict[str, Any]]:
        now_ns = clock.now_ns()
        book = await books.read(log)
        month = await current_month(log, book)
        valid = [held.event.account for held in book.keys.values() if held.state(now_ns) == "valid"]
        return [
            {
                "account": account,
                "opened": opened_at_ns,
                "keys": valid.count(account),
                "plan": book.credits.of(account).plan,
                "available_nanousd": book.credits.room(account, month),
            }
            for account, opened_at_ns in sorted(book.accounts.items())
        ]

    print_list(
        with_log(options, read),
        as_json=options.json,
        formats={"opened": utc_time, "available_nanousd": money},
    )


def create(options: Namespace) -> None:
    scopes = _names(options.scopes, "--scopes")
    if unknown := [scope for scope in scopes if scope not in SCOPES]:
        raise CommandFailed(f"--scopes: unknown scope {unknown[0]!r}; choose from {', '.join(SCOPES)}")
    granted: dict[str, Any] = {"scopes": tuple(scopes)}
    if options.models is not None:
        granted["models"] = tuple(_names(options.models, "--models"))
    if options.expires is not None:
        granted["expires_at_ns"] = expiry_ns(options.expires, clock.now_ns())

    async def issue(log: JetStream) -> tuple[Key, bool]:
        book = await books.read(log)
        _check_models(book, granted.get("models", ()))
        is_new = await book_admin.open_account(log, book, options.account)
        return await book_admin.issue_key(log, options.account, **granted), is_new

    key, is_new = with_log(options, issue)
    if options.json:
        print(json.dumps({"account": options.account, "id": key.id, "key": key.text}))
        return
    print(key.text)
    account = f"{'new ' if is_new else ''}account {options.account}"
    print(f"key {key.id} of {account}; save it now, it cannot be shown again", file=sys.stderr)


def show(options: Namespace) -> None:
    async def read(log: JetStream) -> list[dict[str, Any]]:
        now_ns = clock.now_ns()
        book = await books.read(log)
        if options.account is not None:
            book_admin.check_account(book, options.account)
        matching = [key for key in book.keys.values() if options.account in (None, key.event.account)]
        return [_line(key, now_ns) for key in matching]

    formats: Formats = {"scopes": ",".join, "models": _models}
    for name in ("expires", "created", "revoked"):
        formats[name] = utc_time
    print_list(with_log(options, read), as_json=options.json, formats=formats)


def revoke(options: Namespace) -> None:
    # An operator may paste a whole leaked key. Only its id is used, so the secret is never printed.
    key = keys.id_of(options.key)

    async def write(log: JetStream) -> int:
        return await book_admin.revoke_key(log, await books.read(log), key)

    sequence = with_log(options, write)
    if options.json:
        print(json.dumps({"id": key, "sequence": sequence}))
    else:
        print(f"revoked key {key}; its running requests are being cancelled", file=sys.stderr)


def expiry_ns(text: str, now_ns: int) -> int:
    """Return the expiry of `30d` or `12h` from now, or the start of a date (UTC), in Unix nanoseconds.

    Raises CommandFailed.
    """
    if duration := re.fullmatch(r"(\d{1,6})([dh])", text):
        return _near(now_ns + int(duration[1]) * UNIT_S[duration[2]] * SECOND_NS, now_ns, text)
    try:
        day = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise CommandFailed(
            f"--expires: must be like 30d, 12h, or a date like 2027-01-31 (its start, UTC), got {text!r}"
        ) from None
    start_ns = int(day.timestamp()) * SECOND_NS
    if start_ns <= now_ns:
        raise CommandFailed(f"--expires: {text} has already started (UTC); choose a later date")
    return _near(start_ns, now_ns, text)


def _near(expires_ns: int, now_ns: int, text: str) -> int:
    if not now_ns < expires_ns <= now_ns + LIFETIME_S_MAX * SECOND_NS:
        raise CommandFailed(
            f"--expires: must be a time in the future, at most 100 years away, got {text!r}; "
            "without it a key does not expire"
        )
    return expires_ns


def _line(key: HeldKey, now_ns: int) -> dict[str, Any]:
    event = key.event
    return {
        "id": event.key,
        "account": event.account,
        "state": key.state(now_ns),
        "scopes": event.scopes,
        "models": event.models,
        "expires": event.expires_at_ns,
        "created": key.issued_at_ns,
        "revoked": key.revoked_at_ns,
    }


def _check_models(book: Book, models: tuple[str, ...]) -> None:
    """Refuse unknown models, if any model has a price yet: before that every name is unknown."""
    known = book.prices()
    if known and (unknown := [model for model in models if model not in known]):
        raise CommandFailed(f"--models: unknown model {unknown[0]!r}; known models: {', '.join(known)}")


def _names(text: str, option: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if "" in names:
        raise CommandFailed(f"{option}: an item of {text!r} is empty; write a,b")
    return list(dict.fromkeys(names))


def _models(models: tuple[str, ...] | None) -> str:
    return "all" if models is None else ",".join(models)
