"""A log that is archived and trimmed while control lives, starts again, and starts without its database."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import anyio
import pytest

from events import codec, fleet, memory, subjects
from events.jetstream import connect
from events.log import Log, LogError
from events.memory import MemoryBroker
from events.schema import ControlElected, ReplicaReady, ReplicaStarting, ReplicaStopped, ScaleDecided
from replay.archive.archive import Archive
from replay.warehouse.warehouse import Warehouse
from rift.control import process
from rift.control.config import ControlConfig
from rift.control.duties import archiver as archivers
from rift.control.duties.archiver import Archiver
from rift.control.leader import Leadership
from rift.control.projection.projector import LogTrimmed, Projector
from rift.control.projection.warehouse_host import Projection
from tests.replay.asked import ask_sql

pytestmark = pytest.mark.anyio

SHARD = "RIFT_0"
HOUR_NS = 3600 * 10**9


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archivers, "SEGMENT_RECORDS", 6)
    monkeypatch.setattr(archivers, "LOOK_S", 0.02)


def broker_of(tasks: Any, scribe: Any) -> MemoryBroker:
    broker = MemoryBroker(tasks, lambda: scribe.now_ns)
    for stream, messages in scribe.streams.items():
        for stored in messages:
            broker.streams[stream].add(stored.subject, stored.data, stored.stored_at_ns)
    return broker


@asynccontextmanager
async def controlling(log: Log, folder: Path, **options: Any) -> AsyncIterator[None]:
    stop = anyio.Event()
    archive = Archive(folder / "archive", key=b"k" * 32)
    async with anyio.create_task_group() as group:
        run = partial(process.run, log, folder / "db", archive, ControlConfig(**options), stop=stop)
        group.start_soon(run)
        await answers(log)
        yield
        began_at = anyio.current_time()
        stop.set()
    assert anyio.current_time() - began_at < process.LAST_S


async def answers(log: Log) -> None:
    """Return once control answers."""
    with anyio.fail_after(10):
        while True:
            try:
                await ask_sql(log, "select 1")
                return
            except LogError:
                await anyio.sleep(0.01)


async def begins_at(log: Log, sequence: int, stream: str = SHARD) -> None:
    with anyio.fail_after(5):
        while await log.first_sequence(stream) != sequence:  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def test_archived_records_leave_the_log_and_stay_in_sql(scribe: Any, tmp_path: Path) -> None:
    scribe.prices()
    for _ in range(3):
        scribe.finished_request()
    scribe.now_ns += HOUR_NS
    # It is open and detached, so its segment, the fourth, must stay.
    open_request = scribe.accept(detached=True, deadline_ms=10**9)
    for _ in range(2):
        scribe.finished_request()
    scribe.now_ns += HOUR_NS
    for _ in range(3):
        scribe.finished_request()
    count = "select count(*), sum(charge_nanousd) from requests where state = 'finished'"
    async with anyio.create_task_group() as tasks:
        log = memory.connect(broker_of(tasks, scribe))
        async with controlling(log, tmp_path, retention_days=0):
            await begins_at(log, 19)
            before = (await ask_sql(log, count)).rows
            assert before[0][0] == 8
        # The next process continues with the rest of the log.
        async with controlling(log, tmp_path, retention_days=0):
            assert (await ask_sql(log, count)).rows == before
            still = f"select state from requests where request_id = '{open_request}'"
            assert (await ask_sql(log, still)).rows == [["queued"]]
            assert await log.first_sequence(SHARD) == 19
        (tmp_path / "db").unlink()
        async with controlling(log, tmp_path):
            assert (await ask_sql(log, count)).rows == before, (
                "built from the archive, and the rest of the log"
            )


async def test_a_stopped_projection_holds_the_trim(scribe: Any, tmp_path: Path) -> None:
    scribe.prices()
    for _ in range(2):
        scribe.finished_request()
    scribe.put(SHARD, "rift.0.lane.x", b"{")
    scribe.now_ns += HOUR_NS
    for _ in range(3):
        scribe.finished_request()
    async with anyio.create_task_group() as tasks:
        log = memory.connect(broker_of(tasks, scribe))
        async with controlling(log, tmp_path, retention_days=0):
            pass
        async with controlling(log, tmp_path, retention_days=0):
            archive = Archive(tmp_path / "archive", key=b"k" * 32)
            with anyio.fail_after(5):
                while archive.last(SHARD) < 12:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            await anyio.sleep(0.2)
            (row,) = (await ask_sql(log, "select stopped_sequence from lag where stream = 'RIFT_0'")).rows
            assert row == [13]
        assert archive.last(SHARD) == 12
        assert await log.first_sequence(SHARD) == 1, "nothing newer is archived"


async def test_the_fleet_keeps_records_that_still_matter(scribe: Any, tmp_path: Path) -> None:
    def ready(name: str) -> ReplicaReady:
        return ReplicaReady(replica=name, model="m", slots=1, start_ns=1)

    read = fleet.Fleet()
    needed = []
    for event in (
        ReplicaStarting(replica="a", model="m", engine="sim"),
        decided(0, 2),
        ready("a"),
        decided(2, 3),
        ReplicaStarting(replica="b", model="m", engine="sim"),
        ReplicaStopped(replica="a", model="m"),
        decided(3, 0),
        ReplicaStopped(replica="b", model="m"),
        ReplicaStopped(replica="unknown", model="m"),
    ):
        scribe.fleet(event)
        read.fold(scribe.streams[subjects.FLEET][-1])
        needed.append(read.needed_from)
    assert fleet.Fleet().needed_from == 1
    assert needed == [1, 1, 1, 1, 1, 4, 5, 7, 7]
    async with anyio.create_task_group() as tasks:
        log = memory.connect(broker_of(tasks, scribe))
        warehouse = Warehouse.open(tmp_path / "db")
        projection = Projection(log, tmp_path / "db", warehouse, Archive(tmp_path, key=b"k"))
        assert await projection.needed_from(subjects.FLEET) == 7
        await log.trim(subjects.FLEET, 6)
        assert (await fleet.read(log)).wanted == {"m": 0}
        assert await projection.needed_from(subjects.FLEET) == 7
        warehouse.close()


async def test_a_trimmed_fleet_keeps_the_leader_and_the_decisions(scribe: Any) -> None:
    for epoch in (1, 2, 3):
        scribe.fleet(ControlElected(epoch=epoch, control=f"control-{epoch}"))
        scribe.fleet(decided(epoch - 1, epoch, epoch=epoch))
        # A decision of a deposed leader, and an election for an epoch that has passed.
        scribe.fleet(decided(epoch, 9, epoch=epoch - 1), ControlElected(epoch=epoch, control="late"))
    async with anyio.create_task_group() as tasks:
        log = memory.connect(broker_of(tasks, scribe))
        before = await fleet.read(log)
        await log.trim(subjects.FLEET, before.needed_from - 1)
        assert await log.first_sequence(subjects.FLEET) == 7
        after = await fleet.read(log)
        assert (after.epoch, after.leader, after.wanted) == (3, "control-3", {"m": 3})
        assert after.wanted == before.wanted
        leadership = Leadership(log, "control-4")
        tasks.start_soon(leadership.run, lambda epoch: anyio.sleep_forever())
        with anyio.fail_after(5):
            while not leadership.leads:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert leadership.fleet.epoch == 4
        assert leadership.fleet.wanted == {"m": 3}
        tasks.cancel_scope.cancel()


async def test_a_standby_ends_if_records_it_needs_were_trimmed(scribe: Any, tmp_path: Path) -> None:
    """Its reader would skip the gap without an error."""
    scribe.prices()
    for _ in range(3):
        scribe.finished_request()
    async with anyio.create_task_group() as tasks:
        broker = broker_of(tasks, scribe)
        log = memory.MemoryLog(broker)
        with closing(Warehouse.open(tmp_path / "db")) as warehouse:

            async def be_away() -> None:
                while warehouse.positions().get(SHARD) != 18:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
                log.connection.freeze()
                for _ in range(20):
                    broker.store(SHARD, "rift.0.lane.x", codec.encode("x", []), None)
                broker.stream(SHARD).trim(30)
                log.connection.thaw()

            tasks.start_soon(be_away)
            with anyio.fail_after(5), pytest.raises(BaseExceptionGroup) as raised:
                await Projector(log, warehouse, subjects.folded([0])).run()
            assert raised.group_contains(LogTrimmed, match="RIFT_0 was trimmed up to 30 while", depth=None)
            assert warehouse.positions()[SHARD] == 18
        tasks.cancel_scope.cancel()


def decided(before: int, now: int, *, epoch: int = 0) -> ScaleDecided:
    return ScaleDecided(
        model="m",
        from_replicas=before,
        to_replicas=now,
        reason="",
        policy="",
        positions={},
        decided_at_ns=0,
        inputs={},
        epoch=epoch,
    )


async def test_on_a_real_broker(server: Any, scribe: Any, warehouse: Warehouse, tmp_path: Path) -> None:
    scribe.prices()
    for _ in range(4):
        scribe.finished_request()
    log = await connect(server.address.url, server.address.access("admin"), name="retention")
    try:
        await log.ensure_streams(shards=1, replicas=1, max_bytes=64 << 20)
        for stream, messages in scribe.streams.items():
            for stored in messages:
                last = await log.append(stream, stored.subject, stored.data)

        class Projected:
            """Everything is applied, and the last five records are needed."""

            streams = subjects.folded([0])
            applied: ClassVar = {SHARD: last, subjects.BOOK: 1}

            async def needed_from(self, stream: str) -> int:
                return last - 4

            def quarantined(self, stream: str) -> tuple[int, ...]:
                return ()

        archive = Archive(tmp_path, key=b"k" * 32)
        archiver = Archiver(log, archive, Projected(), retention_days=0)  # type: ignore[arg-type]
        archiver._retention_ns = 0
        sealed = await archiver.archive_now()
        assert {stream: manifest.last for stream, manifest in sealed.items()} == Projected.applied
        with anyio.move_on_after(0.3):
            await archiver.run()
        assert await log.first_sequence(SHARD) == 19
        assert await log.last_sequence(SHARD) == last == 24
        assert await log.first_sequence(subjects.BOOK) == 1
        anchor = await log.last(subjects.BOOK, "rift.book.segment.rift_0")
        assert anchor is not None
        assert sealed[SHARD].sha256.encode() in anchor.data
        with pytest.raises(LogTrimmed):
            await Projector(log, warehouse, subjects.folded([0])).run()
    finally:
        await log.close()
