"""Writing the book: accounts, keys and limits, each a compare-and-set on its own subject; and credit,
corrections and quarantines, which only add up."""

import secrets

from events import codec, credit, subjects
from events.book import Book, key_digest
from events.log import Conflict, Log, OutcomeUnknown, append_until_known
from events.schema import (
    AccountOpened,
    AnyEvent,
    CreditGranted,
    KeyIssued,
    LimitsSet,
    Plan,
    RecordQuarantined,
    UsageCorrected,
)
from rift import keys
from rift.keys import Key
from rift.settings import SHARDS

WRITER = "cli"

# Who grants waits for an answer this long: a broker's restart takes a second or two.
GRANT_S = 10.0

# Random bytes of an entry's id: no two are ever equal.
ENTRY_BYTES = 10


class AccountUnknown(Exception):
    """The book has no such account."""


class OutcomeOpen(Exception):
    """An entry that adds up may be stored or not; the message says how to repeat it, to count once."""


class RecordReadable(Exception):
    """There is no record there that nobody can read."""


async def _append(log: Log, kind: str, entry: str, event: AnyEvent) -> None:
    """Raises Conflict where somebody else wrote the same entry meanwhile, OutcomeUnknown."""
    subject = subjects.book(kind, entry)
    last = await log.last_sequence(subjects.BOOK, subject)
    await log.append(subjects.BOOK, subject, codec.encode(WRITER, [event]), expect_last=last)


async def open_account(log: Log, book: Book, account: str) -> bool:
    """Open an account; return False if it was open already."""
    if account in book.accounts:
        return False
    try:
        await _append(log, "account", account, AccountOpened(id=f"account.{account}", account=account))
    except Conflict:
        return False
    return True


async def issue_key(log: Log, account: str) -> Key:
    """Issue a key, and return it: the only time that its text is known."""
    key = keys.new_key(secrets.token_bytes(keys.ID_BYTES + keys.SECRET_BYTES))
    issued = KeyIssued(id=f"key.{key.id}", key=key.id, account=account, sha256=key_digest(key.text))
    await _append(log, "key", key.id, issued)
    return key


def entry_id(kind: str, account: str, text: str | None) -> str:
    """Return the id of an entry that adds up: for the same text (without dots) the same, else a new one."""
    return f"{kind}.{account}.{text or _unique()}"


async def add(log: Log, book: Book, event: CreditGranted | UsageCorrected) -> bool:
    """Add credit or a correction; return False if the book has its id already, so that it adds nothing.

    Raises AccountUnknown, OutcomeOpen, LogError.
    """
    _check_account(book, event.account)
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


async def set_limits(
    log: Log, book: Book, account: str, *, plan: Plan | None, budget_nanousd: int | None, keep_budget: bool
) -> None:
    """Set an account's limits; `plan` None and `keep_budget` keep what holds by the book.

    Raises AccountUnknown, Conflict, LogError.
    """
    _check_account(book, account)
    standing = book.credits.of(account)
    limits = LimitsSet(
        id=f"limits.{_unique()}",
        account=account,
        plan=plan or standing.plan,
        budget_nanousd=standing.budget_nanousd if keep_budget else budget_nanousd,
    )
    await _append(log, "limits", account, limits)


def _check_account(book: Book, account: str) -> None:
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
