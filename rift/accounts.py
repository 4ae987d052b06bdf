"""Writing the book: accounts, keys and corrections, each a compare-and-set on its own subject."""

import secrets

from events import codec, subjects
from events.book import Book, key_digest
from events.log import Conflict, Log
from events.schema import AccountOpened, AnyEvent, KeyIssued, UsageCorrected
from rift import keys
from rift.keys import Key

WRITER = "cli"


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


async def correct(log: Log, correction: UsageCorrected) -> None:
    await _append(log, "correction", correction.account, correction)
