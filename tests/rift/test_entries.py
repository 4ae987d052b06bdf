"""Writes to the book: a repeated entry counts once, and concurrent changes of limits lose nothing."""

import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest
from msgspec.structs import replace

from events import book as books
from events.log import Conflict, OutcomeUnknown
from events.memory import MemoryBroker, MemoryLog
from events.schema import CreditGranted, UsageCorrected
from rift import book_admin
from rift.book_admin import EntryUnreadable, OutcomeOpen

pytestmark = pytest.mark.anyio

Entry = CreditGranted | UsageCorrected
Make = Callable[[str | None], Entry]


def grant(text: str | None) -> Entry:
    return CreditGranted(id=book_admin.entry_id("grant", "acme", text), account="acme", nanousd=7)


def correction(text: str | None) -> Entry:
    id = book_admin.entry_id("correction", "acme", text)
    return UsageCorrected(id=id, account="acme", nanousd=7, reason="r")


class Unanswered(MemoryLog):
    """A log that stores appends but never acknowledges them."""

    async def append(self, *what: Any, **more: Any) -> int:
        await super().append(*what, **more)
        raise OutcomeUnknown("no answer")


@pytest.fixture
async def broker() -> AsyncIterator[MemoryBroker]:
    async with anyio.create_task_group() as tasks:
        found = MemoryBroker(tasks, lambda: 1_750_000_000_000_000_000)
        log = MemoryLog(found)
        await book_admin.open_account(log, await books.read(log), "acme")
        yield found


async def counted(log: MemoryLog) -> int:
    standing = (await books.read(log)).credits.of("acme")
    return (standing.granted_nanousd or 0) + standing.corrected_nanousd


@pytest.mark.parametrize("make", [grant, correction])
async def test_a_repeated_entry_with_the_same_id_counts_once(
    broker: MemoryBroker, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(book_admin, "APPEND_S", 0.0)
    log = MemoryLog(broker)
    with pytest.raises(OutcomeOpen) as told:
        await book_admin.add(Unanswered(broker), await books.read(log), make(None))
    found = re.search("`--id ([a-z0-9-]{1,40})`, and it counts once", str(told.value))
    assert found is not None
    book = await books.read(log)
    assert not await book_admin.add(log, book, make(found[1]))
    assert await counted(log) == 7
    assert await book_admin.add(log, book, make("other"))
    assert await book_admin.add(log, book, make("other")), "a writer with an older book stores it again"
    assert await counted(log) == 14
    assert await book_admin.add(log, book, make(None))
    assert await book_admin.add(log, book, make(None))
    assert await counted(log) == 28


async def test_an_entry_that_nobody_could_read_is_not_stored(broker: MemoryBroker) -> None:
    log = MemoryLog(broker)
    with pytest.raises(EntryUnreadable, match="expires_at_ns"):
        await book_admin.issue_key(log, "acme", expires_at_ns=2**63)
    book = await books.read(log)
    grant = CreditGranted(id=book_admin.entry_id("grant", "acme", None), account="acme", nanousd=2**63)
    with pytest.raises(EntryUnreadable, match="nanousd"):
        await book_admin.add(log, book, grant)
    with pytest.raises(EntryUnreadable, match="requests_per_minute"):
        await book_admin.set_limits(log, book, "acme", {"requests_per_minute": 0})
    # Python makes such text of an argument in another encoding.
    latin = CreditGranted(id=grant.id, account="acme", nanousd=1, reason="f\udcfcr Mai")
    with pytest.raises(EntryUnreadable, match="is not UTF-8"):
        await book_admin.add(log, book, latin)
    for reason in ("x" * 201, "two\nlines", "\x1b[31m"):
        with pytest.raises(EntryUnreadable, match="one line of text of at most 200"):
            await book_admin.add(log, book, replace(latin, reason=reason))
    assert (await books.read(log)).position == book.position
    assert await book_admin.add(log, book, replace(latin, reason="ü" * 200))


async def test_ids_are_separate_for_each_account_and_kind() -> None:
    ids = {book_admin.entry_id(kind, account, "x") for kind in ("grant", "correction") for account in "ab"}
    assert len(ids) == 4


class Overtaken(MemoryLog):
    """A log on which another command sets a limit just before this append."""

    async def append(self, *what: Any, **more: Any) -> int:
        other = MemoryLog(self._broker)
        await book_admin.set_limits(other, await books.read(other), "acme", {"concurrent": 2})
        return await super().append(*what, **more)


async def test_a_writer_with_an_older_book_cannot_undo_limits(broker: MemoryBroker) -> None:
    log = MemoryLog(broker)
    older = await books.read(log)
    await book_admin.set_limits(log, older, "acme", {"concurrent": 1})
    with pytest.raises(Conflict, match="repeat the command"):
        await book_admin.set_limits(log, older, "acme", {"requests_per_minute": 60})
    with pytest.raises(Conflict, match="repeat the command"):
        await book_admin.set_limits(Overtaken(broker), await books.read(log), "acme", {"concurrent": 9})
    await book_admin.set_limits(log, await books.read(log), "acme", {"requests_per_minute": 60})
    limits = (await books.read(log)).limits["acme"]
    assert (limits.concurrent, limits.requests_per_minute) == (2, 60)


async def test_a_writer_with_an_older_book_cannot_undo_a_keys_limits(broker: MemoryBroker) -> None:
    log = MemoryLog(broker)
    key = (await book_admin.issue_key(log, "acme")).id
    older = await books.read(log)
    await book_admin.set_key_limits(log, older, "acme", key, {"concurrent": 1})
    with pytest.raises(Conflict, match="another command"):
        await book_admin.set_key_limits(log, older, "acme", key, {"requests_per_minute": 60})
