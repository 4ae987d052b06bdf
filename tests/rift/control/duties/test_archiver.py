"""The archiver over the log in memory: when segments are archived, and that it may stop anywhere."""

import threading
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

import anyio
import pytest

from events import subjects
from events.contracts import SECOND_NS
from events.log import OutcomeUnknown, Stored
from events.memory import MemoryBroker, MemoryLog
from events.subjects import BOOK, FLEET
from replay.archive.manifest import ArchiveError
from rift.control.duties import archiver as archivers
from tests.rift.control.archives import SEGMENT, SHARD, Manifest, Rig, Shelf, note

pytestmark = pytest.mark.anyio


# --- sealing ---------------------------------------------------------------------------------------------


async def test_full_segments_are_archived_at_once_and_the_rest_waits(rig: Rig) -> None:
    await rig.fill(3 * SEGMENT + 4)
    await rig.run(rig.archiver())
    assert rig.shelf.lasts() == [10, 20, 30]
    assert [stored.sequence for stored in rig.shelf.records[SHARD]] == list(range(1, 31))
    assert [(a.id, a.stream, a.first, a.last, a.manifest) for a in rig.anchors()] == [
        (f"segment.RIFT_0.{m.first}", SHARD, m.first, m.last, m.sha256) for m in rig.shelf.manifests(SHARD)
    ]
    anchors = rig.broker.streams[BOOK].messages
    assert {stored.subject for stored in anchors} == {"rift.book.segment.rift_0"}
    await rig.fill(6)
    await rig.run(rig.archiver())
    assert rig.shelf.lasts() == [10, 20, 30, 40]


async def test_a_segment_is_bounded_in_bytes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slowly(MemoryLog):
        """Hands out a few messages at a time, as a broker does."""

        async def scan(self, *subject: Any, **bounds: int) -> AsyncGenerator[Sequence[Stored], None]:
            async for batch in super().scan(*subject, **bounds):
                for at in range(0, len(batch), 2):
                    yield batch[at : at + 2]

    monkeypatch.setattr(archivers, "SEGMENT_BYTES", 500)
    await rig.fill(2 * SEGMENT, data=b"x" * 100)
    await rig.archiver(log=Slowly(rig.broker)).archive_now()
    assert rig.shelf.lasts() == [6, 12, 18, 20]


async def test_the_age_of_a_segment_is_measured_by_stored_time(rig: Rig) -> None:
    """So a control that is often started again seals too."""
    await rig.fill(1)
    await rig.fill(1, apart_ns=3599 * SECOND_NS)
    await rig.run(rig.archiver())
    assert rig.shelf.lasts() == []
    await rig.fill(1)
    await rig.run(rig.archiver())
    assert rig.shelf.lasts() == [3]


async def test_waiting_records_are_archived_without_newer_ones(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archivers, "SEGMENT_AGE_S", 0.2)
    await rig.fill(3, apart_ns=1)
    archiver = rig.archiver()
    await rig.run(archiver, 0.1)
    assert rig.shelf.lasts() == []
    await rig.run(archiver, 0.3)
    assert rig.shelf.lasts() == [3]


async def test_only_projected_records_are_archived(rig: Rig) -> None:
    await rig.fill(5 * SEGMENT)
    rig.projected = {SHARD: 29}
    archiver = rig.archiver()
    await rig.run(archiver)
    assert rig.shelf.lasts() == [10, 20]
    assert rig.shelf.lasts(BOOK) == []
    assert list(await archiver.archive_now()) == [SHARD]
    assert rig.shelf.lasts() == [10, 20, 29]


async def test_anchors_do_not_make_segments_of_the_book(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archivers, "SEGMENT_AGE_S", 0.0)
    await rig.fill(SEGMENT)
    archiver = rig.archiver()
    await rig.run(archiver)
    for _ in range(3):
        await archiver.archive_now()
    assert rig.shelf.lasts(BOOK) == []
    assert len(rig.anchors()) == 1
    await note(rig, "a")
    await rig.run(archiver)
    assert rig.shelf.lasts(BOOK) == [2]
    await rig.run(archiver)
    await archiver.archive_now()
    assert rig.shelf.lasts(BOOK) == [2]
    assert [anchor.stream for anchor in rig.anchors()] == [SHARD, BOOK]
    await note(rig, "b")
    assert (await archiver.archive_now())[BOOK].last == 4


async def test_the_book_is_archived_before_the_requests_that_were_admitted_under_it(rig: Rig) -> None:
    await note(rig, "acme")
    await rig.fill(SEGMENT)
    await rig.run(rig.archiver())
    assert (rig.shelf.lasts(BOOK), rig.shelf.lasts()) == ([1], [10])
    assert list(rig.shelf.held) == [BOOK, SHARD]


async def test_archive_now_archives_every_record(rig: Rig) -> None:
    await rig.fill(SEGMENT + 3)
    await note(rig, "a")
    await rig.log.append(FLEET, subjects.fleet("m"), b"x")
    archiver = rig.archiver()
    sealed = await archiver.archive_now()
    assert {stream: (m.first, m.last) for stream, m in sealed.items()} == {
        SHARD: (11, 13),
        FLEET: (1, 1),
        BOOK: (1, 1),
    }
    assert await archiver.archive_now() == sealed
    assert len(rig.anchors()) == 4


async def test_concurrent_calls_of_archive_now_wait_for_each_other(rig: Rig) -> None:
    archiver = rig.archiver()
    results = []

    async def seal() -> None:
        results.append((await archiver.archive_now())[SHARD].last)

    await rig.fill(5)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(archiver.run)
        for _ in range(4):
            tasks.start_soon(seal)
            await rig.fill(7)
        while len(results) < 4:  # noqa: ASYNC110
            await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    assert [s.sequence for s in rig.shelf.records[SHARD]] == list(range(1, max(results) + 1))
    assert len(rig.anchors()) == len(rig.shelf.lasts())


async def test_a_failure_is_logged_and_retried_and_stops_nothing_else(
    rig: Rig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archivers, "RETRY_S", 0.1)
    monkeypatch.setattr(archivers, "SEGMENT_AGE_S", 0.0)
    await rig.fill(SEGMENT)
    await note(rig, "a")
    rig.shelf.failing = [OSError(28, "No space left on device"), ArchiveError("it is broken")]
    archiver = rig.archiver()
    await rig.run(archiver, 0.08)
    assert rig.shelf.lasts() == rig.shelf.lasts(BOOK) == []
    assert caplog.messages == [
        "RIFT_0 is not archived, and so not trimmed: [Errno 28] No space left on device; trying again in 0 s",
        "RIFT_BOOK is not archived, and so not trimmed: it is broken; trying again in 0 s",
    ]
    await rig.run(archiver, 0.2)
    assert rig.shelf.lasts() == [10]
    assert rig.shelf.lasts(BOOK)[0] >= 1
    rig.shelf.failing = [OSError(28, "No space left on device")]
    await rig.fill(1)
    with pytest.raises(OSError, match="No space"):
        await archiver.archive_now()
    assert (await archiver.archive_now())[SHARD].last == 11


async def test_a_book_that_fills_up_is_reported_early_but_not_at_every_look(
    rig: Rig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await note(rig, "a")
    held = rig.broker.streams[BOOK]
    held.bytes_max = 4 * held.size
    await rig.run(rig.archiver())
    assert caplog.messages == [], "three quarters are left"
    for name in "bcd":
        await note(rig, name)
    assert await rig.log.room_bytes(BOOK) == 0
    archiver = rig.archiver()
    await rig.run(archiver)
    await rig.run(archiver)
    assert caplog.messages == [
        f"RIFT_BOOK has 0 of its {held.bytes_max} bytes left, and is kept for ever: when it is full no key "
        "is revoked, no price is published and nothing is trimmed. Most of it are holds and settlements of "
        "accounts with credit or a budget. Raise log_bytes_max in rift.toml and start Rift again"
    ]
    monkeypatch.setattr(archivers, "BOOK_LOOK_S", 0.0)
    archiver = rig.archiver()
    await rig.run(archiver)
    assert len(caplog.messages) > 5


async def test_stopping_does_not_wait_for_a_segment(rig: Rig) -> None:
    await rig.fill(SEGMENT)
    rig.shelf.blocked = threading.Event()
    archiver = rig.archiver()
    began = time.monotonic()
    await rig.run(archiver, 0.1)
    assert time.monotonic() - began < 0.5
    rig.shelf.blocked.set()
    # The abandoned segment is waited for and anchored.
    sealed = await archiver.archive_now()
    assert sealed[SHARD].last == 10
    assert [anchor.manifest for anchor in rig.anchors()] == [sealed[SHARD].sha256]


# --- ends at any point --------------------------------------------------------------------------------------


class Killed(Exception):
    """The process ends here."""


class Dying(MemoryLog):
    """Dies before or after its nth change of the log."""

    def __init__(self, broker: MemoryBroker, shelf: Shelf, at: int) -> None:
        super().__init__(broker)
        self._left = at
        seal = shelf.seal

        def sealing(stream: str, messages: Iterable[Stored], *, last: int, quarantined: Any) -> Manifest:
            self.step()
            manifest = seal(stream, messages, last=last)
            self.step()
            return manifest

        shelf.seal = sealing  # type: ignore[method-assign]

    def step(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise Killed

    async def append(self, stream: str, subject: str, data: bytes, *, expect_last: int | None = None) -> int:
        self.step()
        sequence = await super().append(stream, subject, data, expect_last=expect_last)
        self.step()
        return sequence

    async def trim(self, stream: str, up_to: int) -> None:
        self.step()
        await super().trim(stream, up_to)
        self.step()


@pytest.mark.parametrize("at", range(1, 16))
async def test_an_archiver_continues_wherever_the_last_one_stopped(rig: Rig, at: int) -> None:
    """Three segments and an anchor each, a trim of the first two: fourteen steps."""
    await rig.fill(2 * SEGMENT)
    await rig.fill(SEGMENT, apart_ns=24 * 3600 * SECOND_NS)
    seal = rig.shelf.seal
    dying = rig.archiver(log=Dying(rig.broker, rig.shelf, at))
    killed = False
    try:
        await rig.run(dying)
    except* Killed:
        killed = True
    assert killed == (at <= 14)
    assert rig.first <= rig.shelf.last(SHARD) + 1
    rig.shelf.seal = seal  # type: ignore[method-assign]
    await rig.run(rig.archiver())
    assert rig.shelf.lasts() == [10, 20, 30]
    assert [stored.sequence for stored in rig.shelf.records[SHARD]] == list(range(1, 31))
    anchored = {anchor.id: anchor.manifest for anchor in rig.anchors()}
    assert list(anchored.values()) == [manifest.sha256 for manifest in rig.shelf.manifests(SHARD)]
    assert len(rig.anchors()) == 3, "each was said once"
    assert rig.first == 21


async def test_an_anchor_whose_outcome_is_unknown_is_repeated(rig: Rig) -> None:
    class Unanswered(MemoryLog):
        failing = 2

        async def append(self, stream: str, subject: str, data: bytes, **more: Any) -> int:
            sequence = await super().append(stream, subject, data, **more)
            if self.failing:
                self.failing -= 1
                raise OutcomeUnknown("no answer")
            return sequence

    await rig.fill(SEGMENT)
    assert (await rig.archiver(log=Unanswered(rig.broker)).archive_now())[SHARD].last == 10
    assert [anchor.id for anchor in rig.anchors()] == ["segment.RIFT_0.1"] * 3, "repeats say nothing new"
