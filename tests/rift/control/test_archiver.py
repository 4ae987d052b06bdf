"""The archiver over the log in memory and an archive in memory: what is sealed when, and what may be trimmed.

The archive here is a dictionary that outlives its archiver, as the folder does.
"""

import hashlib
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from typing import Any, NamedTuple

import anyio
import pytest

from events import codec, memory, subjects
from events.log import OutcomeUnknown, Stored
from events.memory import MemoryBroker, MemoryLog
from events.schema import AccountOpened, SegmentSealed
from events.subjects import BOOK, FLEET
from replay.archive import ArchiveError
from rift.control import archiver as archivers
from rift.control.archiver import NANOSECONDS, Archiver

pytestmark = pytest.mark.anyio

SHARD = "RIFT_0"
DAY_NS = 24 * 3600 * NANOSECONDS
START_NS = 1_750_000_000 * NANOSECONDS
SEGMENT = 10
WORK = "rift.0.work.lane1.m"


class Manifest(NamedTuple):
    first: int
    last: int
    at_ns: int
    sha256: str


class Shelf:
    """What `replay.archive.Archive` is to the archiver."""

    def __init__(self) -> None:
        self.held: dict[str, list[Manifest]] = {}
        self.records: dict[str, list[Stored]] = {}
        self.failing: list[Exception] = []
        self.blocked: threading.Event | None = None
        self.under_way = 0

    def last(self, stream: str) -> int:
        return self.held[stream][-1].last if self.held.get(stream) else 0

    def manifests(self, stream: str) -> list[Manifest]:
        return list(self.held.get(stream, []))

    def seal(self, stream: str, messages: Iterable[Stored], *, last: int) -> Manifest:
        self.under_way += 1
        assert self.under_way == 1, "one at a time"
        if self.blocked is not None:
            self.blocked.wait(10)
        time.sleep(0.001)
        self.under_way -= 1
        if self.failing:
            raise self.failing.pop(0)
        found = list(messages)
        assert found[0].sequence == self.last(stream) + 1
        assert found[-1].sequence == last
        digest = hashlib.sha256(repr((stream, found)).encode()).hexdigest()
        manifest = Manifest(found[0].sequence, last, max(s.stored_at_ns for s in found), digest)
        self.held.setdefault(stream, []).append(manifest)
        self.records.setdefault(stream, []).extend(found)
        return manifest

    def lasts(self, stream: str = SHARD) -> list[int]:
        return [manifest.last for manifest in self.manifests(stream)]


class Rig:
    """A log, an archive, and what the projector says. `now_ns` is the broker's clock."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker, self.log, self.shelf = broker, memory.connect(broker), Shelf()
        self.projected: dict[str, int] | None = None
        self.open: dict[str, int] = {}
        self.looks = 0

    async def fill(self, many: int, *, apart_ns: int = NANOSECONDS, data: bytes = b"x") -> None:
        for _ in range(many):
            self.broker.clock[0] += apart_ns
            await self.log.append(SHARD, WORK, data)

    def is_projected(self) -> dict[str, int]:
        self.looks += 1
        if self.projected is not None:
            return self.projected
        return {name: self.broker.streams[name].last_sequence for name in (SHARD, FLEET, BOOK)}

    async def needed_from(self, stream: str) -> int:
        return self.open.get(stream, 1 << 60)

    def archiver(self, *, log: Any = None, retention_days: int = 7) -> Archiver:
        return Archiver(
            log or self.log,
            self.shelf,  # type: ignore[arg-type]
            shards=[0],
            projected=self.is_projected,
            needed_from=self.needed_from,
            retention_days=retention_days,
        )

    async def run(self, archiver: Archiver, for_s: float | None = None) -> None:
        """Run for a time, or for some looks at each stream."""
        enough = self.looks + 15
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(archiver.run)
            with anyio.move_on_after(for_s or 5):
                while for_s or self.looks < enough:  # noqa: ASYNC110
                    await anyio.sleep(0.002)
            tasks.cancel_scope.cancel()

    @property
    def first(self) -> int:
        return self.broker.streams[SHARD].first

    def anchors(self) -> list[SegmentSealed]:
        events = [event for stored in self.broker.streams[BOOK].messages for event in read(stored)]
        return [event for event in events if isinstance(event, SegmentSealed)]


def read(stored: Stored) -> Sequence[Any]:
    return codec.decode(stored.data)[1]


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(archivers, "SEGMENT_RECORDS", SEGMENT)
    monkeypatch.setattr(archivers, "LOOK_S", 0.004)
    monkeypatch.setattr(archivers, "KEPT_NS", 60 * NANOSECONDS)
    clock = [START_NS]
    async with anyio.create_task_group() as tasks:
        broker = MemoryBroker(tasks, lambda: clock[0])
        broker.clock = clock  # type: ignore[attr-defined]
        yield Rig(broker)


async def note(rig: Rig, name: str) -> None:
    data = codec.encode("test", [AccountOpened(id=f"account.{name}", account=name)])
    await rig.log.append(BOOK, subjects.book("account", name), data)


# --- sealing ---------------------------------------------------------------------------------------------


async def test_many_records_are_sealed_at_once_and_the_rest_waits(rig: Rig) -> None:
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


async def test_a_segment_holds_so_many_bytes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slowly(MemoryLog):
        """Hands out a few messages at a time, as a broker does."""

        async def scan(self, *subject: Any, **bounds: int) -> AsyncGenerator[Sequence[Stored], None]:
            async for batch in super().scan(*subject, **bounds):
                for at in range(0, len(batch), 2):
                    yield batch[at : at + 2]

    monkeypatch.setattr(archivers, "SEGMENT_BYTES", 500)
    await rig.fill(2 * SEGMENT, data=b"x" * 100)
    await rig.archiver(log=Slowly(rig.broker)).seal_now()
    assert rig.shelf.lasts() == [6, 12, 18, 20]


async def test_what_waited_an_hour_is_sealed_by_stored_time(rig: Rig) -> None:
    """So a control that is often started again seals too."""
    await rig.fill(1)
    await rig.fill(1, apart_ns=3599 * NANOSECONDS)
    await rig.run(rig.archiver())
    assert rig.shelf.lasts() == []
    await rig.fill(1)
    await rig.run(rig.archiver())
    assert rig.shelf.lasts() == [3]


async def test_what_waits_is_sealed_though_nothing_comes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archivers, "SEGMENT_AGE_S", 0.2)
    await rig.fill(3, apart_ns=1)
    archiver = rig.archiver()
    await rig.run(archiver, 0.1)
    assert rig.shelf.lasts() == []
    await rig.run(archiver, 0.3)
    assert rig.shelf.lasts() == [3]


async def test_only_what_is_projected_is_sealed(rig: Rig) -> None:
    await rig.fill(5 * SEGMENT)
    rig.projected = {SHARD: 29}
    archiver = rig.archiver()
    await rig.run(archiver)
    assert rig.shelf.lasts() == [10, 20]
    assert rig.shelf.lasts(BOOK) == []
    assert list(await archiver.seal_now()) == [SHARD]
    assert rig.shelf.lasts() == [10, 20, 29]


async def test_anchors_do_not_make_segments_of_the_book(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archivers, "SEGMENT_AGE_S", 0.0)
    await rig.fill(SEGMENT)
    archiver = rig.archiver()
    await rig.run(archiver)
    for _ in range(3):
        await archiver.seal_now()
    assert rig.shelf.lasts(BOOK) == []
    assert len(rig.anchors()) == 1
    await note(rig, "a")
    await rig.run(archiver)
    assert rig.shelf.lasts(BOOK) == [2]
    await rig.run(archiver)
    await archiver.seal_now()
    assert rig.shelf.lasts(BOOK) == [2]
    assert [anchor.stream for anchor in rig.anchors()] == [SHARD, BOOK]
    await note(rig, "b")
    assert (await archiver.seal_now())[BOOK].last == 4


async def test_seal_now_seals_whatever_there_is(rig: Rig) -> None:
    await rig.fill(SEGMENT + 3)
    await note(rig, "a")
    await rig.log.append(FLEET, subjects.fleet("m"), b"x")
    archiver = rig.archiver()
    sealed = await archiver.seal_now()
    assert {stream: (m.first, m.last) for stream, m in sealed.items()} == {
        SHARD: (11, 13),
        FLEET: (1, 1),
        BOOK: (1, 1),
    }
    assert await archiver.seal_now() == sealed
    assert len(rig.anchors()) == 4


async def test_who_seals_at_once_waits_for_each_other(rig: Rig) -> None:
    archiver = rig.archiver()
    results = []

    async def seal() -> None:
        results.append((await archiver.seal_now())[SHARD].last)

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


async def test_a_failure_is_said_and_tried_again_and_stops_nothing_else(
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
        await archiver.seal_now()
    assert (await archiver.seal_now())[SHARD].last == 11


async def test_control_does_not_wait_for_a_segment_to_stop(rig: Rig) -> None:
    await rig.fill(SEGMENT)
    rig.shelf.blocked = threading.Event()
    archiver = rig.archiver()
    began = time.monotonic()
    await rig.run(archiver, 0.1)
    assert time.monotonic() - began < 0.5
    rig.shelf.blocked.set()
    # What was left under way is waited for, and anchored.
    sealed = await archiver.seal_now()
    assert sealed[SHARD].last == 10
    assert [anchor.manifest for anchor in rig.anchors()] == [sealed[SHARD].sha256]


# --- trimming --------------------------------------------------------------------------------------------


async def aged(rig: Rig) -> None:
    """Six segments, of which all but the last are past seven days."""
    await rig.fill(3 * SEGMENT)
    await rig.fill(2 * SEGMENT, apart_ns=0)
    rig.broker.clock[0] += 7 * DAY_NS
    await rig.fill(SEGMENT, apart_ns=0)


async def test_what_is_past_the_retention_is_trimmed(rig: Rig) -> None:
    await rig.fill(2 * SEGMENT)
    await rig.fill(1, apart_ns=7 * DAY_NS - NANOSECONDS)
    await rig.fill(SEGMENT - 1, apart_ns=0)
    await rig.run(rig.archiver())
    assert rig.shelf.lasts() == [10, 20, 30]
    assert rig.first == 11, "the second is a second short of it"
    await rig.fill(SEGMENT)
    await rig.run(rig.archiver())
    assert rig.first == 21
    assert (await rig.log.last_sequence(SHARD)) == 40


async def test_without_a_retention_the_last_minutes_are_kept(rig: Rig) -> None:
    await rig.fill(10 * SEGMENT)
    await rig.run(rig.archiver(retention_days=0))
    assert rig.first == 41, "60 of 100 seconds"


async def test_a_retention_is_by_the_brokers_clock_alone(rig: Rig) -> None:
    await rig.fill(3 * SEGMENT)
    rig.broker.clock[0] += 100 * DAY_NS
    await rig.run(rig.archiver())
    assert rig.first == 1, "nothing newer is archived"


async def test_the_book_is_never_trimmed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archivers, "SEGMENT_AGE_S", 0.0)
    for name in ("a", "b", "c"):
        await note(rig, name)
        rig.broker.clock[0] += 100 * DAY_NS
        await rig.run(rig.archiver(retention_days=0))
    assert len(rig.shelf.lasts(BOOK)) == 3
    assert rig.broker.streams[BOOK].first == 1


async def test_what_is_not_projected_is_not_trimmed(rig: Rig) -> None:
    """Where the database is behind the archive: it is being built again."""
    await aged(rig)
    await rig.archiver().seal_now()
    for projected, first in ((0, 1), (19, 11), (29, 21), (60, 51)):
        rig.projected = {SHARD: projected}
        await rig.run(rig.archiver())
        assert rig.first == first


async def test_an_open_request_holds_the_trim(rig: Rig) -> None:
    await aged(rig)
    for open_at, first in ((1, 1), (20, 11), (21, 21), (22, 21), (61, 51)):
        rig.open[SHARD] = open_at
        await rig.run(rig.archiver())
        assert rig.first == first, open_at


async def test_what_is_not_archived_is_not_trimmed(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await aged(rig)
    rig.shelf.failing = [OSError(28, "No space left on device")] * 100
    await rig.run(rig.archiver())
    assert rig.first == 1
    # The log has room for nothing more, and still.
    rig.broker.is_full = True
    await rig.run(rig.archiver())
    assert rig.first == 1


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_an_archive_that_lost_a_segment_is_not_trusted(
    rig: Rig, caplog: pytest.LogCaptureFixture, lost: int
) -> None:
    await aged(rig)
    rig.open[SHARD] = 1
    archiver = rig.archiver()
    await archiver.seal_now()
    rig.open.clear()
    del rig.shelf.held[SHARD][lost]
    await rig.run(archiver)
    assert rig.first == 1
    assert f"the archive lacks {lost * 10 + 1} to {lost * 10 + 10}" in caplog.text


async def test_an_emptied_archive_is_not_trusted(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await aged(rig)
    rig.open[SHARD] = 1
    archiver = rig.archiver()
    await archiver.seal_now()
    rig.open.clear()
    rig.shelf.held.clear()
    await rig.run(archiver)
    assert rig.first == 1
    await rig.run(rig.archiver())
    assert rig.first == 1
    assert "the book says that RIFT_0 51 to 60 is archived under manifest" in caplog.text
    assert rig.shelf.held == {}, "nothing is archived beside what was lost"


async def test_an_archive_of_another_log_is_not_trusted(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.shelf.held[SHARD] = [Manifest(1, 100, START_NS, "a" * 64)]
    await aged(rig)
    await rig.run(rig.archiver())
    assert rig.first == 1
    assert "the archive holds RIFT_0 up to 100, and the log ends at 60" in caplog.text
    with pytest.raises(ArchiveError, match="RIFT_0"):
        await rig.archiver().seal_now()
    # As long as that one by now, and still another.
    rig.shelf.held[SHARD] = [Manifest(1, 60, START_NS - 1, "a" * 64)]
    await rig.run(rig.archiver())
    assert rig.first == 1
    assert rig.anchors() == []
    assert "the archive's segment 1 to 60 of RIFT_0 is older than what the log holds there" in caplog.text


async def test_a_gap_between_archive_and_log_is_said(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await rig.fill(3 * SEGMENT)
    await rig.log.trim(SHARD, 5)
    await rig.run(rig.archiver())
    assert rig.shelf.lasts() == []
    assert "the archive holds RIFT_0 up to 0, and the log begins at 6" in caplog.text


async def test_records_that_vanish_are_not_sealed_over(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    archiver = rig.archiver()
    await rig.fill(SEGMENT)
    await rig.run(archiver)
    await rig.fill(SEGMENT)
    await rig.log.trim(SHARD, 15)
    with pytest.raises(ArchiveError, match="does not hold every record from 11 to 20"):
        await archiver.seal_now()
    assert rig.shelf.lasts() == [10]


# --- a log that runs out of room ---------------------------------------------------------------------------


async def crowd(rig: Rig, many: int) -> None:
    """So many seconds of traffic, and a stream for a hundred of them."""
    rig.broker.streams[SHARD].bytes_max = 100 * memory.broker.size_bytes(WORK, b"x" * 100)
    await rig.fill(many, data=b"x" * 100)


async def test_content_goes_early_where_room_runs_out(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await crowd(rig, 74)
    archiver = rig.archiver()
    await rig.run(archiver)
    assert rig.first == 1
    assert caplog.messages == []
    await rig.fill(16, data=b"x" * 100)
    await rig.run(archiver)
    assert rig.first == 21, "as little as it takes"
    assert "RIFT_0 runs out of room: its prompts and answers up to 20 go before their time" in caplog.text


async def test_nothing_goes_early_that_is_needed(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await crowd(rig, 90)
    rig.open[SHARD] = 15
    archiver = rig.archiver()
    await rig.run(archiver)
    assert rig.first == 11
    await rig.run(rig.archiver())
    assert rig.first == 11
    assert (
        "RIFT_0 runs out of room, and nothing can go: it begins at 11, is archived up to 90, projected up to "
        "90, needed from 15"
    ) in caplog.text


async def test_the_last_minutes_are_kept_even_so(rig: Rig) -> None:
    await crowd(rig, 0)
    await rig.fill(90, apart_ns=NANOSECONDS // 2, data=b"x" * 100)
    await rig.run(rig.archiver())
    assert rig.first == 1


async def test_a_full_log_is_sealed_though_little_waits(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archivers, "SEGMENT_RECORDS", 1000)
    await crowd(rig, 90)
    await rig.run(rig.archiver())
    assert rig.shelf.lasts() == [90]


# --- ends at any point --------------------------------------------------------------------------------------


class Killed(Exception):
    """The process ends here."""


class Dying(MemoryLog):
    """Dies before or behind its nth change of the log."""

    def __init__(self, broker: MemoryBroker, shelf: Shelf, at: int) -> None:
        super().__init__(broker)
        self._left = at
        seal = shelf.seal

        def sealing(stream: str, messages: Iterable[Stored], *, last: int) -> Manifest:
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
async def test_it_may_end_anywhere_and_is_gone_on_with(rig: Rig, at: int) -> None:
    """Three segments and an anchor each, a trim of the first two: fourteen steps."""
    await rig.fill(2 * SEGMENT)
    await rig.fill(SEGMENT, apart_ns=DAY_NS)
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
    assert (await rig.archiver(log=Unanswered(rig.broker)).seal_now())[SHARD].last == 10
    assert [anchor.id for anchor in rig.anchors()] == ["segment.RIFT_0.1"] * 3, "repeats say nothing new"
