"""API keys: `rift keys create`, `rift keys list`, `rift keys revoke`."""

import json
import re
import sys
from argparse import Namespace
from datetime import UTC, datetime
from typing import Any

from events import book as books
from events.book import Book, HeldKey
from events.contracts import SECOND_NS
from events.jetstream import JetStream
from rift import book_admin, clock, keys
from rift.cli.output import CommandFailed, Shown, list_of, moment, with_log
from rift.keys import SCOPES, Key

LASTS_S = {"h": 3600, "d": 86_400}
# A century: what is longer is a mistake, or no expiry.
LASTS_MAX_S = 100 * 366 * 86_400


def create(options: Namespace) -> None:
    scopes = _listed(options.scopes, "--scopes")
    if wrong := [scope for scope in scopes if scope not in SCOPES]:
        raise CommandFailed(f"--scopes: {wrong[0]!r} is no scope; there are {', '.join(SCOPES)}")
    granted: dict[str, Any] = {"scopes": tuple(scopes)}
    if options.models is not None:
        granted["models"] = tuple(_listed(options.models, "--models"))
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
    account = f"account {options.account}{', which is new' if is_new else ''}"
    print(f"key {key.id} of {account}; it is not shown again", file=sys.stderr)


def show(options: Namespace) -> None:
    async def read(log: JetStream) -> list[dict[str, Any]]:
        now_ns = clock.now_ns()
        book = await books.read(log)
        if options.account is not None:
            book_admin.check_account(book, options.account)
        wanted = [held for held in book.keys.values() if options.account in (None, held.event.account)]
        return [_line(held, now_ns) for held in wanted]

    shown: Shown = {"scopes": ",".join, "models": _models}
    for name in ("expires", "created", "revoked"):
        shown[name] = moment
    list_of(with_log(options, read), as_json=options.json, shown=shown)


def revoke(options: Namespace) -> None:
    # Who revokes what has leaked has all of it at hand; it is not said back.
    key = keys.id_of(options.key)

    async def write(log: JetStream) -> int:
        return await book_admin.revoke_key(log, await books.read(log), key)

    sequence = with_log(options, write)
    if options.json:
        print(json.dumps({"id": key, "sequence": sequence}))
    else:
        print(f"key {key} is revoked; what runs under it ends", file=sys.stderr)


def expiry_ns(text: str, now_ns: int) -> int:
    """Return when a key ends that lasts `30d` or `12h` from now, or until the beginning of a day (UTC).

    Raises CommandFailed.
    """
    if found := re.fullmatch(r"(\d{1,6})([dh])", text):
        lasts_s = int(found[1]) * LASTS_S[found[2]]
        if not 0 < lasts_s <= LASTS_MAX_S:
            raise CommandFailed(f"--expires: {text!r} is no time to come of less than a century")
        return now_ns + lasts_s * SECOND_NS
    try:
        day = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        message = (
            f"--expires: {text!r} is no time; write 30d, 12h, or a day like 2027-01-31 (its beginning, UTC)"
        )
        raise CommandFailed(message) from None
    at_ns = int(day.timestamp()) * SECOND_NS
    if at_ns <= now_ns:
        raise CommandFailed(f"--expires: {text} has begun already (UTC)")
    return at_ns


def _line(held: HeldKey, now_ns: int) -> dict[str, Any]:
    event = held.event
    return {
        "id": event.key,
        "account": event.account,
        "state": held.state(now_ns),
        "scopes": event.scopes,
        "models": event.models,
        "expires": event.expires_at_ns,
        "created": held.issued_at_ns,
        "revoked": held.revoked_at_ns,
    }


def _check_models(book: Book, models: tuple[str, ...]) -> None:
    """Where nothing is priced yet, no name can be told from a mistake."""
    known = book.prices()
    if known and (wrong := [model for model in models if model not in known]):
        raise CommandFailed(f"--models: {wrong[0]!r} is not known here; known: {', '.join(known)}")


def _listed(text: str, option: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    if "" in found:
        raise CommandFailed(f"{option}: {text!r} names nothing at one place; write a,b")
    return list(dict.fromkeys(found))


def _models(models: tuple[str, ...] | None) -> str:
    return "all" if models is None else ",".join(models)
