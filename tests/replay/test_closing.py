"""Control over the log in memory: periods are closed, the file is rebuilt, and all of it comes out again."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from events import memory, schema, subjects
from events.memory import MemoryBroker, MemoryLog
from replay.archive.archive import Archive
from replay.billing import invoice as invoices
from replay.warehouse.warehouse import Warehouse
from rift import book_admin
from rift.book_admin import RecordReadable
from rift.cli.log.verify import differences
from rift.control import process
from rift.control.config import ControlConfig
from rift.control.projection import projector
from rift.control.projection.catch_up import fold_tail, rebuilt
from rift.control.projection.time_travel import InvalidPosition, fold_until, parse
from rift.rpc import (
    AnswerFailed,
    AskInvoice,
    AskInvoices,
    AskRequests,
    AskStatus,
    AskUsage,
    ClosePeriod,
    Digests,
    ProjectionBlocked,
    QuestionRefused,
    Rebuild,
    SealSegment,
    Sql,
    ask,
)

pytestmark = pytest.mark.anyio

SECOND = 1_000_000_000
DECEMBER_NS = 1_701_388_800 * SECOND
PERIOD, NEXT = "2023-11", "2023-12"


class Rig:
    """A broker that holds the scribe's records and runs on the scribe's clock."""

    def __init__(self, broker: MemoryBroker, scribe: Any, folder: Path) -> None:
        self.broker, self.scribe, self.folder = broker, scribe, folder
        self.log = memory.connect(broker)
        self.archive = Archive(folder / "archive", key=b"k")
        self._put: dict[str, int] = {}

    def put(self) -> None:
        """Store what the scribe has written since, with its times."""
        for stream in sorted(self.scribe.streams, key=lambda name: name != subjects.BOOK):
            messages = self.scribe.streams[stream]
            for message in messages[self._put.get(stream, 0) :]:
                self.broker.clock_ns = message.stored_at_ns  # type: ignore[attr-defined]
                self.broker.store(stream, message.subject, message.data, None)
            self._put[stream] = len(messages)
        self.broker.clock_ns = self.scribe.now_ns  # type: ignore[attr-defined]

    def ordinary(self, *, account: str = "dev", **fields: Any) -> None:
        if not self.scribe.streams:
            for name in ("acme", "dev"):
                self.scribe.book(schema.AccountOpened(id=f"account.{name}", account=name))
            self.scribe.prices(prompt=100, output=350)
        # Control itself may have appended to the book.
        self.scribe.finished_request(account=account, book=2, **fields)
        self.put()

    def over(self) -> None:
        """Let the month be over: the gateway reports."""
        self.scribe.now_ns = max(self.scribe.now_ns, DECEMBER_NS)
        self.scribe.put("RIFT_0", "rift.0.lane.x", b'{"version":1,"writer":"x","events":[]}')
        self.put()

    async def ask(self, question: Any) -> Any:
        return await ask(self.log, question, timeout_s=20)


@pytest.fixture
async def rig(scribe: Any, tmp_path: Path) -> AsyncIterator[Rig]:
    async with anyio.create_task_group() as tasks:
        broker = MemoryBroker(tasks, lambda: broker.clock_ns)  # type: ignore[attr-defined]
        broker.clock_ns = scribe.now_ns  # type: ignore[attr-defined]
        yield Rig(broker, scribe, tmp_path)
        tasks.cancel_scope.cancel()


@asynccontextmanager
async def controlling(rig: Rig) -> AsyncIterator[None]:
    log = MemoryLog(rig.broker)
    async with anyio.create_task_group() as tasks:
        database = rig.folder / "rift.duckdb"
        run = partial(process.run, log, database, rig.archive, ControlConfig(), stop=anyio.Event())
        tasks.start_soon(run)
        with anyio.fail_after(5):
            while Rebuild.topic not in rig.broker.answers:  # noqa: ASYNC110
                await anyio.sleep(0.005)
        yield
        tasks.cancel_scope.cancel()


async def test_a_closed_period_is_frozen_archived_and_reproducible(rig: Rig) -> None:
    rig.ordinary()
    rig.ordinary(account="acme")
    rig.over()
    async with controlling(rig):
        before = await rig.ask(AskInvoice("dev", PERIOD))
        assert before["status"] == "open"
        closed = await rig.ask(ClosePeriod(PERIOD))
        assert (closed["accounts"], closed["total_nanousd"]) == (2, 2 * before["total_nanousd"])
        assert closed["roots"] == {s: rig.archive.manifests(s)[-1].sha256 for s in rig.archive.streams()}
        after = await rig.ask(AskInvoice("dev", PERIOD))
        assert (after["status"], after["lines"]) == ("closed", before["lines"])
        assert after["positions"] == closed["positions"]
        with pytest.raises(QuestionRefused, match="2023-11 is closed, and stays as it is"):
            await rig.ask(ClosePeriod(PERIOD))
        assert (await rig.ask(Sql("select rules from periods")))["rows"] == [[invoices.RULES]]
        digests = await rig.ask(Digests())
    assert await by_replay(rig, digests) == []


async def by_replay(rig: Rig, digests: Any) -> list[str]:
    warehouse = await rebuilt(rig.log, rig.archive, rig.folder / "again.duckdb")
    try:
        await fold_tail(rig.log, warehouse, until=digests["positions"])
        return list(differences(warehouse, digests))
    finally:
        warehouse.close()


async def test_a_period_that_is_not_over_is_not_closed(rig: Rig) -> None:
    rig.ordinary()
    async with controlling(rig):
        with pytest.raises(
            QuestionRefused, match="2023-11 is not over: the last record was stored 2023-11-14"
        ):
            await rig.ask(ClosePeriod(PERIOD))
        with pytest.raises(QuestionRefused, match="'2023-11-01' is not a period"):
            await rig.ask(ClosePeriod("2023-11-01"))
        assert (await rig.ask(Sql("from periods")))["rows"] == []
        assert await rig.log.last_sequence(subjects.BOOK, "rift.book.period.2023-11") == 0


async def test_periods_are_closed_in_their_order(rig: Rig) -> None:
    rig.ordinary()
    rig.over()
    rig.ordinary()
    rig.scribe.now_ns += 40 * 86_400 * SECOND
    rig.over()
    async with controlling(rig):
        with pytest.raises(QuestionRefused, match="2023-11 has charges and is open; close it first"):
            await rig.ask(ClosePeriod(NEXT))
        await rig.ask(ClosePeriod(PERIOD))
        assert (await rig.ask(ClosePeriod(NEXT)))["accounts"] == 1


async def test_a_rebuild_changes_nothing_but_the_file(rig: Rig) -> None:
    """From the archive and the tail of the log, while questions are asked and requests come."""
    for _ in range(5):
        rig.ordinary()
    async with controlling(rig):
        await rig.ask(SealSegment())
        rig.ordinary()
        before = (await rig.ask(Digests()))["digests"]
        inode = (rig.folder / "rift.duckdb").stat().st_ino
        await rig.ask(Rebuild())
        assert (await rig.ask(Digests()))["digests"] == before
        assert (rig.folder / "rift.duckdb").stat().st_ino != inode
        rig.ordinary()
        assert (await rig.ask(Sql("select count(*) from requests")))["rows"] == [[7]]
        assert not list(rig.folder.glob("*.rebuilding*"))


async def test_a_rebuild_from_a_damaged_archive_changes_nothing(rig: Rig) -> None:
    rig.ordinary()
    async with controlling(rig):
        await rig.ask(SealSegment())
        before = (await rig.ask(Digests()))["digests"]
        (damaged,) = (rig.folder / "archive" / "RIFT_0").glob("*.events.parquet")
        damaged.write_bytes(damaged.read_bytes()[:-100])
        with pytest.raises(QuestionRefused, match=r"nothing was changed: .*events\.parquet"):
            await rig.ask(Rebuild())
        assert (await rig.ask(Digests()))["digests"] == before


async def test_a_lost_file_is_built_from_the_archive_where_the_log_is_trimmed(rig: Rig) -> None:
    for _ in range(4):
        rig.ordinary()
    async with controlling(rig):
        sealed = await rig.ask(SealSegment())
        before = (await rig.ask(Digests()))["digests"]
    rig.broker.stream("RIFT_0").trim(sealed["positions"]["RIFT_0"])
    (rig.folder / "rift.duckdb").unlink()
    async with controlling(rig):
        assert (await rig.ask(Digests()))["digests"] == before
        rig.ordinary()
        assert (await rig.ask(Sql("select count(*) from requests")))["rows"] == [[5]]


async def test_without_the_archive_a_trimmed_log_stops_control_by_name(rig: Rig) -> None:
    rig.ordinary()
    async with controlling(rig):
        sealed = await rig.ask(SealSegment())
    rig.broker.stream("RIFT_0").trim(sealed["positions"]["RIFT_0"])
    (rig.folder / "rift.duckdb").unlink()
    shutil.rmtree(rig.folder / "archive")
    with pytest.raises(BaseExceptionGroup) as raised:
        async with controlling(rig):
            await anyio.sleep(5)
    assert "RIFT_0: the segment of 1 to 6 was sealed and is missing" in repr(raised.value)


async def test_replay_finds_changes_of_the_file(rig: Rig) -> None:
    rig.ordinary()
    rig.over()
    async with controlling(rig):
        await rig.ask(ClosePeriod(PERIOD))
    warehouse = Warehouse.open(rig.folder / "rift.duckdb")
    warehouse._reopened().writer.execute(
        "update facts.ended_requests set charge_nanousd = charge_nanousd + 1"
    )
    warehouse.close()
    async with controlling(rig):
        problems = await by_replay(rig, await rig.ask(Digests()))
    assert [line.partition(":")[0] for line in problems] == [
        "invoice line only in use",
        "invoice line only by replay",
        *("requests", "usage", "charges", "invoice_lines", "balances"),
    ]


async def test_the_past_is_as_it_was(rig: Rig) -> None:
    """At each position the past is the same, whether it comes from the archive or from the log."""
    rig.ordinary()
    rig.ordinary()
    async with controlling(rig):
        await rig.ask(SealSegment())
        rig.ordinary()
    last = await rig.log.last_sequence("RIFT_0")
    ended = []
    for sequence in range(1, last + 1):
        warehouse = Warehouse.open(Path(":memory:"))
        await fold_until(rig.log, rig.archive, warehouse, parse(f"RIFT_0:{sequence}"))
        assert warehouse.positions()["RIFT_0"] == sequence
        [[count]] = warehouse.query("select count(*) from requests where state = 'finished'").rows
        ended.append(count)
        warehouse.close()
    assert ended == [sequence // 6 for sequence in range(1, last + 1)]


async def test_the_past_holds_other_streams_up_to_the_same_time(rig: Rig) -> None:
    rig.ordinary()
    rig.scribe.prices(2)
    rig.ordinary()
    warehouse = Warehouse.open(Path(":memory:"))
    await fold_until(rig.log, rig.archive, warehouse, parse("RIFT_0:6.0"))
    assert warehouse.query("select max(version) from prices").rows == [[1]]
    warehouse.close()


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "RIFT_0": "is not a position; write stream:sequence",
        "RIFT_0:x": "is not a position",
        "RIFT_7:1": "there is no stream 'RIFT_7'; the streams are",
        "RIFT_0:99": "RIFT_0 holds sequences 1 to 6, not 99",
        "RIFT_0:0": "RIFT_0 holds sequences 1 to 6, not 0",
    }.items(),
)
async def test_invalid_positions(rig: Rig, text: str, message: str) -> None:
    rig.ordinary()
    warehouse = Warehouse.open(Path(":memory:"))
    with pytest.raises(InvalidPosition, match=message):
        await fold_until(rig.log, rig.archive, warehouse, parse(text))
    warehouse.close()


async def test_every_reader_skips_a_quarantined_record(rig: Rig) -> None:
    """The projection stops at it and continues once the book quarantines it; every way to rebuild agrees."""
    rig.ordinary()
    rig.scribe.put("RIFT_0", "rift.0.lane.x", b"no record")
    rig.ordinary()
    rig.put()
    count = Sql("select count(*) from requests")
    async with controlling(rig):
        assert (await rig.ask(count))["rows"] == [[1]]
        with pytest.raises(RecordReadable, match="RIFT_0:6 can be decoded"):
            await book_admin.quarantine(rig.log, "RIFT_0", 6, "x")
        for stream, sequence in (("RIFT_0", 99), ("RIFT_9", 1), ("RIFT_BOOK", 1)):
            with pytest.raises(RecordReadable, match=stream):
                await book_admin.quarantine(rig.log, stream, sequence, "x")
        await book_admin.quarantine(rig.log, "RIFT_0", 7, "written by hand")
        with anyio.fail_after(10):
            while (await rig.ask(count))["rows"] != [[2]]:  # noqa: ASYNC110
                await anyio.sleep(0.05)
        lag = await rig.ask(Sql("select quarantined, stopped_why from lag where stream = 'RIFT_0'"))
        assert lag["rows"] == [[[7], None]]
        assert (await rig.ask(SealSegment()))["positions"]["RIFT_0"] == 13
        assert list(rig.archive.verify()) == []
        digests = await rig.ask(Digests())
        await rig.ask(Rebuild())
        assert (await rig.ask(Digests()))["digests"] == digests["digests"]
    assert await by_replay(rig, digests) == []
    warehouse = Warehouse.open(Path(":memory:"))
    await fold_until(rig.log, rig.archive, warehouse, parse("RIFT_0:13"))
    assert warehouse.query(count.sql).rows == [[2]]
    warehouse.close()


async def test_no_bill_lacks_records_in_silence(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.ordinary()
    bills = AskUsage("dev", PERIOD + "-01", PERIOD + "-30"), AskInvoice("dev", PERIOD)
    questions = *bills, AskInvoices("dev", 1), AskRequests("dev", 1)
    async with controlling(rig):
        [row] = (await rig.ask(bills[0]))["data"]
        assert row["requests"] == 1
        rig.scribe.put("RIFT_0", "rift.0.lane.x", b"no record")
        rig.ordinary()
        for question in questions:
            with pytest.raises(ProjectionBlocked, match="would lack stored records"):
                await rig.ask(question)
        # The operator still sees where it stopped.
        assert (await rig.ask(AskStatus()))["lag"]
        await book_admin.quarantine(rig.log, "RIFT_0", 7, "written by hand")
        with anyio.fail_after(10):
            while True:
                with suppress(ProjectionBlocked):
                    assert (await rig.ask(bills[0]))["data"][0]["requests"] == 2
                    break
                await anyio.sleep(0.05)
        monkeypatch.setattr(projector, "CATCH_UP_S", 0.0)
        rig.ordinary()
        with pytest.raises(ProjectionBlocked, match="would lack stored records"):
            await rig.ask(bills[0])


async def test_a_period_is_not_closed_over_unprojected_records(rig: Rig) -> None:
    """The month is over by one stream's time, and another is stopped in the middle of it."""
    rig.ordinary()
    rig.scribe.put("RIFT_0", "rift.0.lane.x", b"no record")
    rig.ordinary()
    rig.scribe.now_ns = DECEMBER_NS
    rig.scribe.fleet(schema.ReplicaDraining(replica="r", model="tiny:1"))
    rig.put()
    async with controlling(rig):
        with pytest.raises(
            QuestionRefused, match="RIFT_0 is projected up to 6 of 13, and may hold more of 2023-11"
        ):
            await rig.ask(ClosePeriod(PERIOD))
        assert await rig.log.last_sequence(subjects.BOOK, "rift.book.period.2023-11") == 0


@pytest.mark.parametrize(
    ("period", "message"),
    [
        ("2001-01", "2001-01 was over before anything was stored here"),
        ("0001-01", "'0001-01' is not a period"),
        ("9999-12", "'9999-12' is not a period"),
    ],
)
async def test_impossible_months(rig: Rig, period: str, message: str) -> None:
    rig.ordinary()
    async with controlling(rig):
        with pytest.raises(QuestionRefused, match=message):
            await rig.ask(ClosePeriod(period))


async def test_control_answers_whatever_goes_wrong(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.ordinary()
    async with controlling(rig):
        monkeypatch.setattr(invoices, "usage", lambda *_: 1 // 0)
        with pytest.raises(AnswerFailed, match="control failed to answer: ZeroDivisionError"):
            await rig.ask(AskUsage("dev", "2023-11-01", "2023-11-30"))
        with pytest.raises(QuestionRefused, match="Catalog Error"):
            await rig.ask(Sql("from nothing"))


async def test_a_rebuild_during_the_start_waits_for_it(rig: Rig) -> None:
    for _ in range(3):
        rig.ordinary()
    async with controlling(rig):
        sealed = await rig.ask(SealSegment())
        before = (await rig.ask(Digests()))["digests"]
    rig.broker.stream("RIFT_0").trim(sealed["positions"]["RIFT_0"])
    (rig.folder / "rift.duckdb").unlink()
    async with controlling(rig):
        await rig.ask(Rebuild())
        assert (await rig.ask(Digests()))["digests"] == before


async def test_a_folder_without_segments_is_not_an_archive(rig: Rig) -> None:
    """A first seal that was cut off leaves one."""
    rig.ordinary()
    (rig.folder / "archive" / "RIFT_0").mkdir(parents=True)
    async with controlling(rig):
        assert rig.archive.streams() == []
        await rig.ask(Rebuild())
        assert (await rig.ask(Sql("select count(*) from requests")))["rows"] == [[1]]
