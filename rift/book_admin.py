"""Writing the book: accounts, keys and limits, each a compare-and-set on its own subject; and credit,
corrections and quarantines, which only add up."""

import secrets
from typing import Any

from msgspec.structs import replace

from events import codec, credit, subjects
from events.book import Book, key_digest
from events.log import Conflict, Log, OutcomeUnknown, append_until_known
from events.schema import (
    AccountOpened,
    AnyEvent,
    CreditGranted,
    KeyIssued,
    KeyLimitsSet,
    KeyRevoked,
    LimitsSet,
    RecordQuarantined,
    UsageCorrected,
)
from rift import keys
from rift.errors import RiftError
from rift.keys import Key
from rift.settings import SHARDS

WRITER = "cli"

# Who grants waits for an answer this long: a broker's restart takes a second or two.
GRANT_S = 10.0

CHANGED = "somebody else changed this meanwhile, and nothing was stored: repeat the command"

# Random bytes of an entry's id: no two are ever equal.
ENTRY_BYTES = 10


class AccountUnknown(RiftError):
    """The book has no such account."""


class KeyUnknown(RiftError):
    """The book has no such key, or it is revoked already."""


class OutcomeOpen(RiftError):
    """An entry that adds up may be stored or not; the message says how to repeat it, to count once."""


class RecordReadable(RiftError):
    """There is no record there that nobody can read."""


async def _append(log: Log, kind: str, entry: str, event: AnyEvent, *, read_to: int) -> None:
    """Raises Conflict where somebody else wrote the same entry after the book was read, OutcomeUnknown."""
    subject = subjects.book(kind, entry)
    last = await log.last_sequence(subjects.BOOK, subject)
    if last > read_to:
        raise Conflict(CHANGED)
    try:
        await log.append(subjects.BOOK, subject, codec.encode(WRITER, [event]), expect_last=last)
    except Conflict as error:
        raise Conflict(CHANGED) from error


async def open_account(log: Log, book: Book, account: str) -> bool:
    """Open an account; return False if it was open already."""
    if account in book.accounts:
        return False
    opened = AccountOpened(id=f"account.{account}", account=account)
    try:
        await _append(log, "account", account, opened, read_to=book.position)
    except Conflict:
        return False
    return True


async def issue_key(log: Log, account: str, **granted: Any) -> Key:
    """Issue a key, and return it: the only time that its text is known. `granted` are its scopes, models and
    expiry, as `KeyIssued` has them."""
    key = keys.new_key(secrets.token_bytes(keys.ID_BYTES + keys.SECRET_BYTES))
    digest = key_digest(key.text)
    issued = KeyIssued(id=f"key.{key.id}", key=key.id, account=account, sha256=digest, **granted)
    await _append(log, "key", key.id, issued, read_to=0)
    return key


async def revoke_key(log: Log, book: Book, key: str) -> int:
    """Revoke a key, and return where the book says so.

    Raises KeyUnknown, OutcomeUnknown, LogError: said again, it does what it did.
    """
    held = book.keys.get(key)
    if held is None:
        raise KeyUnknown(
            f"there is no key {key!r}; `rift keys list` shows their ids, the part between a key's underscores"
        )
    if held.revoked_at_ns is not None:
        raise KeyUnknown(f"key {key} of account {held.event.account} is revoked already")
    revoked = KeyRevoked(id=f"revoked.{key}", key=key, account=held.event.account)
    data = codec.encode(WRITER, [revoked])
    return await append_until_known(log, subjects.BOOK, subjects.book("key", key), data, within_s=GRANT_S)


def entry_id(kind: str, account: str, text: str | None) -> str:
    """Return the id of an entry that adds up: for the same text (without dots) the same, else a new one."""
    return f"{kind}.{account}.{text or _unique()}"


async def add(log: Log, book: Book, event: CreditGranted | UsageCorrected) -> bool:
    """Add credit or a correction; return False if the book has its id already, so that it adds nothing.

    Raises AccountUnknown, OutcomeOpen, LogError.
    """
    check_account(book, event.account)
    if book.has(event.id):
        return False
    is_credit = isinstance(event, CreditGranted)
    subject = credit.subject(event.account) if is_credit else subjects.book("correction", event.account)
    data = codec.encode(WRITER, [event])
    try:
        await append_until_known(log, subjects.BOOK, subject, data, within_s=GRANT_S)
    except OutcomeUnknown as error:
        text = event.id.rpartition(".")[2]
        raise OutcomeOpen(
            f"{error}; the entry may be stored, or be stored yet: repeat the command with `--id {text}`, "
            "and it counts once"
        ) from error
    return True


async def set_limits(log: Log, book: Book, account: str, changed: dict[str, Any]) -> None:
    """Set what is named of an account's limits, as `LimitsSet` has them; the rest stays as the book says.

    Raises AccountUnknown, Conflict, LogError.
    """
    check_account(book, account)
    limits = replace(book.limits.get(account) or LimitsSet(id="", account=account), **changed)
    await _append(log, "limits", account, _anew(limits), read_to=book.position)


async def set_key_limits(log: Log, book: Book, account: str, key: str, changed: dict[str, Any]) -> None:
    """As `set_limits`, for a key. Raises KeyUnknown, too."""
    check_account(book, account)
    held = book.keys.get(key)
    if held is None or held.event.account != account or held.revoked_at_ns is not None:
        raise KeyUnknown(f"account {account} has no key {key!r} that is not revoked; see `rift keys list`")
    limits = replace(held.limits or KeyLimitsSet(id="", account=account, key=key), **changed)
    await _append(log, "keylimits", key, _anew(limits), read_to=book.position)


def _anew(limits: LimitsSet | KeyLimitsSet) -> LimitsSet | KeyLimitsSet:
    return replace(limits, id=f"limits.{_unique()}")


def check_account(book: Book, account: str) -> None:
    """Raises AccountUnknown."""
    if account not in book.accounts:
        raise AccountUnknown(
            f"there is no account {account!r}; `rift keys create --account {account}` opens it"
        )


def _unique() -> str:
    return secrets.token_hex(ENTRY_BYTES)


async def quarantine(log: Log, stream: str, sequence: int, reason: str) -> None:
    """Raises RecordReadable, LogError."""
    everything = subjects.folded(range(SHARDS)).get(stream)
    if everything is None or stream == subjects.BOOK:
        raise RecordReadable(f"{stream} is not a stream whose records can be passed over")
    if not 1 <= sequence <= await log.last_sequence(stream):
        raise RecordReadable(f"{stream} holds no record {sequence}")
    async for batch in log.scan(stream, [everything], first=sequence, target=sequence):
        for stored in batch:
            if _is_readable(stored.data):
                raise RecordReadable(
                    f"{stream}:{sequence} can be read; only what nobody can read is passed over"
                )
    event = RecordQuarantined(
        id=f"quarantine.{stream}.{sequence}", stream=stream, sequence=sequence, reason=reason
    )
    data = codec.encode(WRITER, [event])
    subject = subjects.book("quarantine", stream.lower())
    await append_until_known(log, subjects.BOOK, subject, data, within_s=GRANT_S)


def _is_readable(data: bytes) -> bool:
    try:
        return not any(isinstance(event, codec.Unreadable) for event in codec.decode(data)[1])
    except codec.RecordUnreadable:
        return False
