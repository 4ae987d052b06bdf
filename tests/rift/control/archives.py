"""An archive in a dictionary, which outlives its archiver as the folder does, and its projection."""

import hashlib
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import anyio

from events import codec, memory, subjects
from events.contracts import SECOND_NS
from events.log import Stored
from events.memory import MemoryBroker
from events.schema import AccountOpened, SegmentSealed
from events.subjects import BOOK, FLEET
from rift.control.duties.archiver import Archiver

SHARD = "RIFT_0"
START_NS = 1_750_000_000 * SECOND_NS
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
        self.damaged: dict[int, list[str]] = {}
        self.blocked: threading.Event | None = None
        self.under_way = 0

    def last(self, stream: str) -> int:
        return self.held[stream][-1].last if self.held.get(stream) else 0

    def manifests(self, stream: str) -> list[Manifest]:
        return list(self.held.get(stream, []))

    def seal(self, stream: str, messages: Iterable[Stored], *, last: int, quarantined: Any = ()) -> Manifest:
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

    def damaged_files(self, manifest: Manifest) -> Iterable[str]:
        return self.damaged.get(manifest.last, ())

    def lasts(self, stream: str = SHARD) -> list[int]:
        return [manifest.last for manifest in self.manifests(stream)]


class Rig:
    """A log, an archive, and the archiver's projection. Tests change `clock`, the broker's."""

    streams = subjects.folded([0])

    def __init__(self, broker: MemoryBroker, clock: list[int]) -> None:
        self.clock = clock
        self.broker, self.log, self.shelf = broker, memory.connect(broker), Shelf()
        self.projected: dict[str, int] | None = None
        self.open: dict[str, int] = {}
        self.looks = 0
        self.skipped: tuple[int, ...] = ()

    async def fill(self, many: int, *, apart_ns: int = SECOND_NS, data: bytes = b"x") -> None:
        for _ in range(many):
            self.clock[0] += apart_ns
            await self.log.append(SHARD, WORK, data)

    @property
    def applied(self) -> dict[str, int]:
        self.looks += 1
        if self.projected is not None:
            return self.projected
        return {name: self.broker.streams[name].last_sequence for name in (SHARD, FLEET, BOOK)}

    def quarantined(self, stream: str) -> tuple[int, ...]:
        return self.skipped

    async def needed_from(self, stream: str) -> int:
        return self.open.get(stream, 1 << 60)

    def archiver(self, *, log: Any = None, retention_days: int = 7) -> Archiver:
        return Archiver(
            log or self.log,
            self.shelf,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
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


async def note(rig: Rig, name: str) -> None:
    data = codec.encode("test", [AccountOpened(id=f"account.{name}", account=name)])
    await rig.log.append(BOOK, subjects.book("account", name), data)
