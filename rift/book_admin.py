"""Writes to the book.

Accounts, keys, limits and price lists are compare-and-sets on their own subjects. Credit, corrections and
quarantines only add up, so that they need no order.
"""

import secrets
from contextlib import aclosing
from typing import Any

from msgspec.structs import replace

from events import codec, shards, subjects
from events.book import Book, key_digest
from events.log import Conflict, Log, OutcomeUnknown, Stored
from events.publisher import Publisher, destination
from events.schema import (
    AccountOpened,
    AnyEvent,
    CreditGranted,
    KeyIssued,
    KeyLimitsSet,
    KeyRevoked,
    LimitsSet,
    PricePublished,
    RecordQuarantined,
    SigningKeyPublished,
    UsageCorrected,
)
from rift import keys
from rift.errors import RiftError
from rift.keys import Key

WRITER = "cli"

# How long an append that adds up is repeated: a broker's restart takes a second or two.
APPEND_S = 10.0

# Every process keeps the whole book in memory.
REASON_CHARACTERS = 200
REASON_SHOWN = 40

CHANGED = "another command changed this at the same time, so nothing was stored: repeat the command"

# Random bytes of an entry's id, enough that no two are equal.
ENTRY_BYTES = 10


class AccountUnknown(RiftError):
    """The book has no such account."""


class KeyUnknown(RiftError):
    """The book has no such key, or it is already revoked."""


class OutcomeOpen(RiftError):
    """It is unknown whether an entry was stored; the message explains how to retry it idempotently."""


class EntryUnreadable(RiftError):
    """No reader could read the entry, or its reason is no short line, so it is not stored: the book's records
    cannot be skipped."""


class RecordReadable(RiftError):
    """The position does not hold an unreadable record, so it cannot be quarantined."""


async def _set(log: Log, event: AnyEvent, *, read_to: int) -> None:
    """Append an entry that replaces an earlier one.

    Raises Conflict if the entry was written after `read_to`, the position of the caller's book;
    EntryUnreadable, OutcomeUnknown.
    """
    _check(event)
    last = await log.last_sequence(*destination(event))
    if last > read_to:
        raise Conflict(CHANGED)
    try:
        await Publisher(log, WRITER).publish_at(event, expect_last=last)
    except Conflict as error:
        raise Conflict(CHANGED) from error


async def _add(log: Log, event: AnyEvent) -> int:
    """Append an entry that adds up. Raises EntryUnreadable, OutcomeUnknown."""
    _check(event)
    return await Publisher(log, WRITER).publish(event, within_s=APPEND_S)


def _check(event: AnyEvent) -> None:
    try:
        _, (read,) = codec.decode(codec.encode(WRITER, [event]))
    except UnicodeEncodeError as error:
        raise EntryUnreadable(f"nothing was stored, because {error.object!r} is not UTF-8") from error
    if isinstance(read, codec.Unreadable):
        raise EntryUnreadable(f"nothing was stored, because no process could read it: {read.problem}")
    reason: str = getattr(event, "reason", "")
    if not reason.isprintable() or len(reason) > REASON_CHARACTERS:
        shown = repr(reason[:REASON_SHOWN]) + ("…" if len(reason) > REASON_SHOWN else "")
        raise EntryUnreadable(
            f"nothing was stored, because the reason must be one line of text of at most {REASON_CHARACTERS} "
            f"characters, got {len(reason)}: {shown}"
        )


async def publish_signing_key(log: Log, book: Book, public: str) -> bool:
    """Put a public key into the book. Return False if it is there already."""
    event = SigningKeyPublished(id=f"signer.{public[:16]}", key=public)
    if book.has(event.id):
        return False
    await _add(log, event)
    return True


async def open_account(log: Log, book: Book, account: str) -> bool:
    """Open an account. Return False if it is already open."""
    if account in book.accounts:
        return False
    opened = AccountOpened(id=f"account.{account}", account=account)
    try:
        await _set(log, opened, read_to=book.position)
    except Conflict:
        return False
    return True


async def issue_key(log: Log, account: str, **granted: Any) -> Key:
    """Issue a key and return it; its text is not stored anywhere.

    `granted` are its scopes, models and expiry, with the names of `KeyIssued`.
    """
    key = keys.new_key(secrets.token_bytes(keys.ID_BYTES + keys.SECRET_BYTES))
    digest = key_digest(key.text)
    issued = KeyIssued(id=f"key.{key.id}", key=key.id, account=account, sha256=digest, **granted)
    await _set(log, issued, read_to=0)
    return key


async def revoke_key(log: Log, book: Book, key: str) -> int:
    """Revoke a key, and return the sequence of the revocation.

    Raises KeyUnknown, OutcomeUnknown, LogError; repeating it has no further effect.
    """
    entry = book.keys.get(key)
    if entry is None:
        raise KeyUnknown(
            f"there is no key {key!r}; `rift keys list` shows their ids, the part between a key's underscores"
        )
    if entry.revoked_at_ns is not None:
        raise KeyUnknown(f"key {key} of account {entry.event.account} is already revoked")
    return await _add(log, KeyRevoked(id=f"revoked.{key}", key=key, account=entry.event.account))


def entry_id(kind: str, account: str, text: str | None) -> str:
    """Return the id of an entry that adds up: fixed for a text (without dots), random without one."""
    return f"{kind}.{account}.{text or _unique()}"


async def add(log: Log, book: Book, event: CreditGranted | UsageCorrected) -> bool:
    """Add credit or a correction. Return False, and add nothing, if the book already has its id.

    Raises AccountUnknown, OutcomeOpen, LogError.
    """
    check_account(book, event.account)
    if book.has(event.id):
        return False
    try:
        await _add(log, event)
    except OutcomeUnknown as error:
        text = event.id.rpartition(".")[2]
        raise OutcomeOpen(
            f"{error}; the entry may still be stored: repeat the command with `--id {text}`, "
            "and it counts once"
        ) from error
    return True


async def set_limits(log: Log, book: Book, account: str, changed: dict[str, Any]) -> None:
    """Change the named limits of an account, with the names of `LimitsSet`, and keep the others.

    Raises AccountUnknown, Conflict, LogError.
    """
    check_account(book, account)
    limits = replace(book.limits.get(account) or LimitsSet(id="", account=account), **changed)
    await _set(log, _with_new_id(limits), read_to=book.position)


async def set_key_limits(log: Log, book: Book, account: str, key: str, changed: dict[str, Any]) -> None:
    """As `set_limits`, for a key. Raises KeyUnknown too."""
    check_account(book, account)
    entry = book.keys.get(key)
    if entry is None or entry.event.account != account or entry.revoked_at_ns is not None:
        raise KeyUnknown(f"account {account} has no valid key {key!r}; `rift keys list` shows its keys")
    limits = replace(entry.limits or KeyLimitsSet(id="", account=account, key=key), **changed)
    await _set(log, _with_new_id(limits), read_to=book.position)


def _with_new_id(limits: LimitsSet | KeyLimitsSet) -> LimitsSet | KeyLimitsSet:
    return replace(limits, id=f"limits.{_unique()}")


def check_account(book: Book, account: str) -> None:
    """Raise AccountUnknown if the book does not have the account."""
    if account not in book.accounts:
        raise AccountUnknown(
            f"there is no account {account!r}; `rift keys create --account {account}` opens it"
        )


async def publish_prices(log: Log, book: Book, published: PricePublished) -> None:
    """Put a price list in force. Raises Conflict if another list was published after the book was read."""
    await _set(log, published, read_to=book.position)


def _unique() -> str:
    return secrets.token_hex(ENTRY_BYTES)


async def quarantine(log: Log, stream: str, sequence: int, reason: str) -> None:
    """Make all readers skip an unreadable record. Raises RecordReadable, LogError."""
    everything = subjects.folded(range(await shards.count(log))).get(stream)
    if everything is None or stream == subjects.BOOK:
        raise RecordReadable(f"records of {stream} cannot be skipped; only a shard's and the fleet's can")
    if not 1 <= sequence <= await log.last_sequence(stream):
        raise RecordReadable(f"{stream} has no record {sequence}")
    async with aclosing(log.scan(stream, [everything], first=sequence, target=sequence)) as batches:
        records = [stored async for batch in batches for stored in batch]
    if any(_is_readable(stored) for stored in records):
        raise RecordReadable(f"{stream}:{sequence} can be decoded; only unreadable records can be skipped")
    event = RecordQuarantined(
        id=f"quarantine.{stream}.{sequence}", stream=stream, sequence=sequence, reason=reason
    )
    await _add(log, event)


def _is_readable(stored: Stored) -> bool:
    try:
        return not any(
            isinstance(event, codec.Unreadable) for event in codec.decode(stored.data, stored.subject)[1]
        )
    except codec.RecordUnreadable:
        return False
