"""The control process over a log held in lists: its answers, their delay, and how it stops."""

import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from events import codec, shards, subjects
from events.contracts import CREDIT_LANE_SILENT_S, MESSAGE_BYTES_MAX, REPLY_BYTES_MAX, SECOND_NS
from events.log import LogError, Stored
from events.memory import MemoryBroker, MemoryLog
from events.schema import AccountOpened, CreditHeld, CreditSettled, LaneReported
from replay.archive.archive import Archive
from replay.sql_files import sql
from replay.warehouse import warehouse
from replay.warehouse.warehouse import Warehouse
from rift.cli.status.report import stops
from rift.control import process
from rift.control.config import ControlConfig
from rift.control.duties import credit_settlement
from rift.control.projection import projector, warehouse_host
from rift.control.projection.projector import AHEAD_MAX, LogBehind, LogTrimmed, Projector
from rift.rpc import QuestionRefused, Sql
from tests.replay.asked import ask_sql

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def controlling(log: Any, database: Path) -> AsyncIterator[None]:
    async with anyio.create_task_group() as group:
        archive = Archive(database.with_name("archive"), key=b"k")
        group.start_soon(partial(process.run, log, database, archive, ControlConfig(), stop=anyio.Event()))
        with anyio.fail_after(5):
            while Sql.topic not in log.handlers:  # noqa: ASYNC110
                await anyio.sleep(0.005)
        yield
        group.cancel_scope.cancel()


async def until(log: Any, sql: str, is_wanted: Callable[[list[list[Any]]], bool]) -> list[list[Any]]:
    with anyio.fail_after(10):
        while not is_wanted(rows := (await ask_sql(log, sql)).rows):  # noqa: ASYNC110
            await anyio.sleep(0.01)
    return rows


async def test_an_accepted_request_is_in_sql_within_a_second(
    scribe: Any, list_log: Any, tmp_path: Path
) -> None:
    scribe.prices()
    log = list_log(scribe.streams)
    async with controlling(log, tmp_path / "db"):
        for count in (1, 2, 3):
            scribe.accept()
            log.grow()
            began = time.monotonic()
            await until(log, "select count(*) from requests", lambda rows, n=count: rows == [[n]])
            assert time.monotonic() - began < 1


async def test_an_answer_covers_every_record_stored_before_its_question(
    scribe: Any, list_log: Any, tmp_path: Path
) -> None:
    scribe.prices()
    log = list_log(scribe.streams)
    async with controlling(log, tmp_path / "db"):
        for count in range(1, 20):
            scribe.accept()
            log.grow()
            assert (await ask_sql(log, "select count(*) from requests")).rows == [[count]]


async def test_everything_is_applied_and_continued_after_a_restart(
    scribe: Any, list_log: Any, tmp_path: Path
) -> None:
    scribe.prices()
    log = list_log(scribe.streams)
    for version, count in ((2, 40), (3, 80)):
        for _ in range(40):
            scribe.finished_request()
        scribe.prices(version)
        scribe.accept(price_version=version)
        async with controlling(log, tmp_path / "db"):
            done = "select count(*) from requests where state = 'finished'"
            await until(log, done, lambda rows, n=count: rows == [[n]])
            log.grow()


async def test_a_file_of_another_version_is_built_again(
    scribe: Any, list_log: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scribe.prices()
    scribe.finished_request()
    log = list_log(scribe.streams)
    with monkeypatch.context() as older:
        older.setattr(warehouse, "schema_version", lambda: "1-older")
        Warehouse.open(tmp_path / "db").close()
    async with controlling(log, tmp_path / "db"):
        await until(log, "select count(*) from requests", lambda rows: rows == [[1]])


async def test_a_shard_waits_for_the_book(scribe: Any, list_log: Any, tmp_path: Path) -> None:
    """The shard's first batch names a book position that the book's reader hands out later."""
    scribe.prices()
    scribe.accept()
    book = scribe.streams[subjects.BOOK]
    log = list_log(scribe.streams | {subjects.BOOK: []})

    plain = log.last_sequence

    async def last_sequence(stream: str, subject: str | None = None) -> int:
        if subject is not None:
            return await plain(stream, subject)
        return len(scribe.streams.get(stream, ()))

    log.last_sequence = last_sequence
    async with controlling(log, tmp_path / "db"):
        await anyio.sleep(0.2)
        assert (await ask_sql(log, "from requests")).rows == []
        log.streams[subjects.BOOK] = book
        log.grow()
        await until(log, "from requests", lambda rows: len(rows) == 1)


async def test_the_credit_of_a_killed_gateway_comes_back(
    scribe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader settles what a lane holds once it has been silent for its minute, and not before."""
    monkeypatch.setattr(credit_settlement, "TICK_S", 0.01)
    monkeypatch.setattr(projector, "PACE_S", 0.01)
    scribe.prices()
    held = CreditHeld(id="hold", account="dev", shard=0, lane="laneaaaa", nanousd=1000)
    scribe.book(AccountOpened(id="a", account="dev"), held)
    scribe.finished_request(allowance="hold")
    silent_ns = int(CREDIT_LANE_SILENT_S * SECOND_NS)
    async with anyio.create_task_group() as group:
        broker = MemoryBroker(group, lambda: scribe.now_ns)
        log = MemoryLog(broker)

        def report(lane: str, after_ns: int = 0) -> None:
            scribe.now_ns += after_ns
            data = codec.encode("test", [LaneReported(lane=lane)])
            broker.store("RIFT_0", subjects.lane(0, lane), data, None)

        async def silence_ns() -> int:
            last = await log.last("RIFT_0", subjects.lane(0, "laneaaaa"))
            return 0 if last is None else int(scribe.now_ns - last.stored_at_ns)

        def settled() -> dict[str, int]:
            stored = broker.stream(subjects.BOOK).messages
            events = [event for record in stored for event in codec.decode(record.data)[1]]
            return {event.hold: event.nanousd for event in events if isinstance(event, CreditSettled)}

        for stream, messages in scribe.streams.items():
            for message in messages:
                broker.store(stream, message.subject, message.data, None)
        report("laneaaaa")
        report("other", silent_ns)
        archive = Archive(tmp_path / "archive", key=b"k")
        running = partial(process.run, log, tmp_path / "db", archive, ControlConfig(), stop=anyio.Event())
        group.start_soon(running)
        with anyio.fail_after(5):
            # The janitor's record that the lane is lost begins another minute.
            while await silence_ns():  # noqa: ASYNC110
                await anyio.sleep(0.01)
            report("other", silent_ns)
            await anyio.sleep(0.3)
            assert settled() == {}
            report("other", 1)
            while not settled():  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert settled() == {"hold": 7 * 10 + 3 * 20}
        group.cancel_scope.cancel()


async def test_a_request_of_a_book_that_never_was_stops_visibly(
    scribe: Any, list_log: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scribe.prices()
    scribe.accept(book=9)
    log = list_log(scribe.streams)
    async with controlling(log, tmp_path / "db"):
        stopped = "select stopped_sequence, stopped_why from lag where stopped_why is not null"
        [[sequence, why]] = await until(log, stopped, bool)
        assert sequence == 1
        assert "RIFT_BOOK:9" in why
        assert "the book ends at 1" in why
        shown = await ask_sql(log, sql("control/status_lag"))
        assert stops([dict(zip(shown.columns, row, strict=True)) for row in shown.rows]) == [
            f"the projection stopped at RIFT_0:1: {why}"
        ]
        with anyio.fail_after(5):
            while "the projection stopped at RIFT_0:1" not in caplog.text:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert (await ask_sql(log, "select 1")).rows == [[1]], "questions are still answered"


async def test_an_unreadable_record_stops_project(scribe: Any, list_log: Any, warehouse: Warehouse) -> None:
    scribe.prices()
    scribe.put("RIFT_0", "rift.0.lane.x", b"{")
    with pytest.raises(BaseExceptionGroup) as raised:
        await Projector(list_log(scribe.streams), warehouse, subjects.folded([0])).run()
    assert "the projection stopped at RIFT_0:1: not a record" in str(
        list(warehouse_host._messages(raised.value))
    )


async def test_another_log_is_refused(scribe: Any, list_log: Any, warehouse: Warehouse) -> None:
    scribe.prices()
    scribe.finished_request()
    for stream in (subjects.BOOK, "RIFT_0"):
        warehouse.apply(stream, scribe.streams[stream])
    shorter = scribe.streams | {"RIFT_0": scribe.streams["RIFT_0"][:2]}
    with pytest.raises(LogBehind, match="RIFT_0 ends at 2, but the database has applied it up to 6"):
        await Projector(list_log(shorter), warehouse, subjects.folded([0])).run()


@pytest.mark.parametrize("applied", [0, 1, 2])
async def test_a_projector_does_not_skip_a_trimmed_gap(
    scribe: Any, list_log: Any, warehouse: Warehouse, applied: int
) -> None:
    scribe.prices()
    scribe.finished_request()
    warehouse.apply(subjects.BOOK, scribe.streams[subjects.BOOK])
    warehouse.apply("RIFT_0", scribe.streams["RIFT_0"][:applied])
    log = list_log(scribe.streams | {"RIFT_0": scribe.streams["RIFT_0"][2:]})
    if applied == 2:
        with anyio.move_on_after(0.2):
            await Projector(log, warehouse, subjects.folded([0])).run()
        assert warehouse.positions()["RIFT_0"] == 6
        return
    why = f"RIFT_0 begins at 3, but the database has applied it only up to {applied}.*rift replay --rebuild"
    with pytest.raises(LogTrimmed, match=why):
        await Projector(log, warehouse, subjects.folded([0])).run()


async def test_reading_ahead_is_bounded(
    scribe: Any, list_log: Any, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    scribe.prices()
    read = 0

    async def endless(stream: str, after: int) -> AsyncIterator[list[Stored]]:
        nonlocal read
        while stream == "RIFT_0":
            messages = [Stored("rift.0.lane.x", after + n + 1, 1, b"") for n in range(1_000)]
            after, read = after + 1_000, read + 1_000
            yield messages
        await anyio.sleep_forever()

    @asynccontextmanager
    async def follow(
        stream: str, subjects: Sequence[str], *, after: int, pace_s: float = 0.0
    ) -> AsyncIterator[AsyncIterator[list[Stored]]]:
        yield endless(stream, after)

    log = list_log(scribe.streams)
    log.follow = follow
    log.streams["RIFT_0"] = []
    monkeypatch.setattr(warehouse, "apply", lambda stream, _: time.sleep(0.3) if stream == "RIFT_0" else None)
    with anyio.move_on_after(0.2):
        await Projector(log, warehouse, subjects.folded([0])).run()
    assert AHEAD_MAX <= read <= 2 * AHEAD_MAX


class HearsLateOfShards(MemoryLog):
    @asynccontextmanager
    async def follow(self, stream: str, topics: Sequence[str], **options: Any) -> AsyncIterator[Any]:
        if subjects.SHARD_LIST in topics:
            await anyio.sleep(0.3)
        async with super().follow(stream, topics, **options) as reader:
            yield reader


async def test_an_answer_has_the_records_of_a_shard_that_was_just_opened(
    scribe: Any, warehouse: Warehouse
) -> None:
    async with anyio.create_task_group() as group:
        broker = MemoryBroker(group, lambda: scribe.now_ns)
        log = HearsLateOfShards(broker)
        projector = Projector(log, warehouse, subjects.folded([0]))
        group.start_soon(projector.run)
        assert await projector.catch_up()
        broker.add_shard()
        await shards.open_up_to(log, 2, writer="test")
        request = subjects.request(subjects.Address(1, "laneaaaa", "tiny-1"))
        await log.append("RIFT_1", request, codec.encode("test", []))
        assert await projector.catch_up()
        assert projector.applied["RIFT_1"] == 1
        group.cancel_scope.cancel()


async def test_the_loop_stays_free_while_a_batch_is_applied(
    scribe: Any, list_log: Any, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    scribe.prices()
    monkeypatch.setattr(warehouse, "apply", lambda *_: time.sleep(0.4))
    slowest = 0.0
    with anyio.move_on_after(1.0):
        async with anyio.create_task_group() as group:
            group.start_soon(Projector(list_log(scribe.streams), warehouse, subjects.folded([0])).run)
            while True:
                began = time.monotonic()
                await anyio.sleep(0.01)
                slowest = max(slowest, time.monotonic() - began)
    assert slowest < 0.2


# --- questions -----------------------------------------------------------------------------------


async def test_answers_and_errors_are_json(scribe: Any, list_log: Any, tmp_path: Path) -> None:
    log = list_log(scribe.streams)
    async with controlling(log, tmp_path / "db"):

        async def asked(data: bytes) -> Any:
            return json.loads(await log.ask(Sql.topic, data, timeout_s=5))

        assert (await asked(b'{"sql": "select 1 as one, null as none"}'))["answer"] == {
            "columns": ["one", "none"],
            "rows": [[1, None]],
        }
        assert "allowed is one SELECT over requests" in (await asked(b'{"sql": "drop view lag"}'))["error"]
        for bad in (b"", b"[]", b'{"sql": 1}', b'{"sql": "select 1", "x": 1}', b"\xff", b"[" * 100_000):
            assert "rift.ask.sql takes JSON with sql" in (await asked(bad))["error"]


async def test_ask_sql_answers_or_raises(scribe: Any, list_log: Any, tmp_path: Path) -> None:
    log = list_log(scribe.streams)
    with pytest.raises(LogError, match="no process answers"):
        await ask_sql(log, "select 1")
    async with controlling(log, tmp_path / "db"):
        answer = await ask_sql(log, "select 9223372036854775807::hugeint * 4 as nanousd")
        assert (answer.columns, answer.rows) == (["nanousd"], [[9223372036854775807 * 4]])
        with pytest.raises(QuestionRefused, match="INSERT is not answered"):
            await ask_sql(log, "insert into requests values (1)")


async def test_a_reply_too_large_for_the_broker_is_refused(
    scribe: Any, list_log: Any, tmp_path: Path
) -> None:
    log = list_log(scribe.streams)
    async with controlling(log, tmp_path / "db"):
        with pytest.raises(QuestionRefused, match="more than 8000000 bytes; use LIMIT"):
            await ask_sql(log, "select repeat('x', 1000) from range(9000)")
        assert REPLY_BYTES_MAX < MESSAGE_BYTES_MAX
