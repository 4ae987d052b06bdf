"""The SQL process on a real broker: what it answers, what it refuses, and how it ends."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from events import subjects
from events.jetstream import JetStream, connect
from events.jetstream.wire import ApiError
from events.schema import SegmentSealed
from replay.archive.archive import Archive
from replay.warehouse.warehouse import Warehouse
from rift.control.sql import host as hosts
from rift.control.sql import standby as standbys
from rift.control.sql.frames import QUESTION, SETUP, SqlSetup, frame
from rift.control.sql.host import SqlHost, ask_once
from rift.control.sql.standby import Standby
from rift.rpc import QuestionRefused, Sql, answer_of
from tests.service import environment
from tests.small_disk import small_disk

pytestmark = pytest.mark.anyio

REQUESTS = "select count(*) from requests"
CROSS_JOIN = "select count(*) from range(1000000000) a, range(1000000000) b"


class Operator:
    """Asks a host that a test started."""

    def __init__(self, log: JetStream, setup: SqlSetup) -> None:
        self.log = log
        self.setup = setup
        self.host = SqlHost(setup)

    async def ask(self, sql: str) -> Any:
        return answer_of(Sql.topic, await self.host.ask(sql))["rows"]

    async def refused(self, sql: str) -> str:
        with pytest.raises(QuestionRefused) as raised:
            await self.ask(sql)
        return str(raised.value)

    @property
    def process(self) -> int:
        assert self.host._process is not None, "none runs"
        return self.host._process.pid

    async def append(self, scribe: Any) -> None:
        """Append what the scribe has written since the last call."""
        for stream, messages in scribe.streams.items():
            for stored in messages[await self.log.last_sequence(stream) :]:
                await self.log.append(stream, stored.subject, stored.data)


@pytest.fixture
async def operator(server: Any, tmp_path: Path) -> AsyncIterator[Operator]:
    address = server.address
    log = await connect(address.url, address.access("admin"), name="test")
    for stream in (subjects.shard_stream(0), subjects.FLEET, subjects.BOOK):
        with contextlib.suppress(ApiError):
            await log._remove(f"STREAM.DELETE.{stream}")
    await log.ensure_streams(shards=1, replicas=1, max_bytes=64 << 20)
    found = Operator(
        log,
        SqlSetup(
            database=str(tmp_path / "rift-sql.duckdb"),
            url=address.url,
            access=address.access("reader"),
            archive=str(tmp_path / "archive"),
            archive_key=b"k",
        ),
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(found.host.run)
        yield found
        tasks.cancel_scope.cancel()
    assert found.host._process is None, "whoever stops leading ends it"
    await log.close()


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def status(process: int, name: str) -> str:
    return Path(f"/proc/{process}/{name}").read_text().strip()


async def until_gone(process: int) -> None:
    with anyio.fail_after(3), contextlib.suppress(OSError):
        while "State:\tZ" not in status(process, "status"):  # noqa: ASYNC110  # another process
            await anyio.sleep(0.02)


async def test_an_answer_covers_what_was_stored_and_a_kill_loses_nothing(
    operator: Operator, scribe: Any
) -> None:
    scribe.prices()
    for count in range(1, 6):
        scribe.finished_request()
        await operator.append(scribe)
        assert await operator.ask(REQUESTS) == [[count]]
    process = operator.process
    assert os.getpriority(os.PRIO_PROCESS, process) == 10
    assert status(process, "oom_score_adj") == "1000"
    assert "rift-sql.duckdb" in status(process, "cmdline")
    # In the middle of an answer.
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(operator.refused, "select sleep_ms(60000)")
        await anyio.sleep(0.3)
        os.kill(process, signal.SIGSEGV)
    scribe.finished_request()
    await operator.append(scribe)
    assert await operator.ask(REQUESTS) == [[6]]
    assert operator.process != process
    assert await operator.ask("select max(behind) from lag") == [[0]]


async def test_what_crashes_the_process_is_named(operator: Operator) -> None:
    await operator.ask("select 1")

    async def crash() -> None:
        await anyio.sleep(0.3)
        os.kill(operator.process, signal.SIGSEGV)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(crash)
        why = await operator.refused("select sleep_ms(60000)")
    assert why == "the SQL process was ended by SIGSEGV at this question; ask again, or for less"


HOSTILE = {
    "select len(range(400000000))": "more memory than a question may use",
    "select string_agg(repeat('x', 1000000), '') from range(100000)": "more memory than a question may use",
    "select range(300) from range(99999)": "more than 8000000 bytes; use LIMIT",
    f"select {'(' * 10_000}1{')' * 10_000}": "Max expression depth limit of 1000 exceeded",
    f"select {'not ' * 50_000}true": "Max expression depth limit of 1000 exceeded",
    f"select '{'x' * 1_000_000}'": "the question has 1000009 bytes, more than 262144",
    "from checkpoint()": "checkpoint is not answered",
    "from truncate_duckdb_logs()": "truncate_duckdb_logs is not answered",
    "from duckdb_settings()": "duckdb_settings is not answered",
    "": "the question is empty",
}
# These never look at DuckDB's clock, or never end.
ENDLESS = (
    f"select {'[' * 900}1{']' * 900}",
    "select printf('%2000000000d', 1)",
    "select repeat('x', 1000000000) || repeat('y', 1000000000)",
    "with recursive t as (select 1 as n union all select n + 1 from t) select count(*) from t",
    CROSS_JOIN,
)


async def test_hostile_questions_meet_a_limit(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    await operator.ask("select 1")
    process = operator.process
    for question, why in HOSTILE.items():
        assert why in await operator.refused(question), question[:80]
    assert operator.process == process, "the process refuses them by itself"
    monkeypatch.setattr(hosts, "SQL_KILL_S", 1.2)
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            if operator.host._process is not None:
                with contextlib.suppress(OSError):
                    most = max(most, resident_bytes(operator.process))
            await anyio.sleep(0.05)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(watch)
        for question in ENDLESS:
            began = time.monotonic()
            await operator.refused(question)
            assert time.monotonic() - began < 6, question[:80]
        tasks.cancel_scope.cancel()
    assert 100 << 20 < most <= 2 * 1024**3
    monkeypatch.undo()
    assert await operator.ask("select 1") == [[1]]


async def test_questions_queue_and_are_told_when_it_is_too_long(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    await operator.ask("select 1")
    monkeypatch.setattr(hosts, "WAITING_MAX", 2)
    monkeypatch.setattr(hosts, "SQL_QUEUE_S", 0.7)
    monkeypatch.setattr(hosts, "SQL_KILL_S", 1.0)
    answers: dict[int, str] = {}

    async def ask(number: int) -> None:
        answers[number] = await operator.refused("select sleep_ms(60000)")

    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(ask, number)
    assert sorted(answers.values()) == [
        *["2 questions wait for an answer; ask again in a minute"] * 2,
        *["earlier questions took more than 0.7 s; ask again in a minute"] * 2,
        "not answered within 10 s; ask again, or for less",
    ]


async def test_an_idle_process_ends(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "IDLE_S", 0.5)
    host = SqlHost(operator.setup)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(host.run)
        await host.ask("select 1")
        assert host._process is not None
        await until_gone(host._process.pid)
        assert b'"rows": [[1]]' in await host.ask("select 1"), "the next question starts another"
        tasks.cancel_scope.cancel()


SCRIPT = """
import sys, time
import anyio, msgspec
from rift.control.sql.frames import SqlSetup
from rift.control.sql.host import SqlHost
async def main():
    host = SqlHost(msgspec.json.decode(sys.argv[1], type=SqlSetup))
    await host.ask("select 1")
    print(host._process.pid, flush=True)
    await host.ask("select count(*) from range(1000000000) a, range(1000000000) b")
anyio.run(main)
"""


async def test_it_dies_with_the_process_that_started_it(operator: Operator) -> None:
    command = [sys.executable, "-c", SCRIPT, msgspec.json.encode(operator.setup).decode()]
    async with await anyio.open_process(command, env=environment(), stderr=None) as parent:
        assert parent.stdout is not None
        process = int(await parent.stdout.receive())
        await anyio.sleep(0.2)
        parent.kill()
        await until_gone(process)


ORPHAN = """
import os, sys
import anyio, msgspec
from rift.control.sql.frames import SqlSetup
from rift.control.sql.host import SqlHost
async def main():
    host = SqlHost(msgspec.json.decode(sys.argv[1], type=SqlSetup))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(host.ask, "select count(*) from range(1000000000) a, range(1000000000) b")
        while host._process is None:
            await anyio.sleep(0)
        print(host._process.pid, flush=True)
        os._exit(0)
anyio.run(main)
"""


async def test_it_ends_if_the_process_that_started_it_dies_at_once(operator: Operator) -> None:
    command = [sys.executable, "-c", ORPHAN, msgspec.json.encode(operator.setup).decode()]
    orphan = await anyio.run_process(command, env=environment(), stderr=None)
    await until_gone(int(orphan.stdout))


async def test_it_ends_quietly_if_nobody_reads_its_answer(tmp_path: Path) -> None:
    Warehouse.open(tmp_path / "db").close()
    setup = msgspec.json.encode(SqlSetup(str(tmp_path / "db")))
    command = [sys.executable, "-m", hosts.PROCESS, str(tmp_path / "db"), str(os.getpid())]
    asked = frame(SETUP, setup) + frame(QUESTION, b"select 1")
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write):
        done = await anyio.run_process(command, input=asked, stdout=write, check=False, env=environment())
    assert (done.returncode, done.stderr) == (0, b"")


async def test_it_follows_a_broker_that_restarts(operator: Operator, server: Any, scribe: Any) -> None:
    scribe.prices()
    scribe.finished_request()
    await operator.append(scribe)
    assert await operator.ask(REQUESTS) == [[1]]
    server.kill()
    assert await operator.ask(REQUESTS) == [[1]], "as old as the log's silence"
    server.start()
    with anyio.fail_after(10):
        while not operator.log.is_connected:  # noqa: ASYNC110  # another process
            await anyio.sleep(0.05)
    scribe.finished_request()
    await operator.append(scribe)
    assert await operator.ask(REQUESTS) == [[2]]


async def test_a_file_of_another_log_is_built_again(operator: Operator, scribe: Any) -> None:
    scribe.prices()
    scribe.finished_request()
    other = Warehouse.open(Path(operator.setup.database))
    for stream in (subjects.BOOK, "RIFT_0"):
        other.apply(stream, scribe.streams[stream])
    other.close()
    assert await operator.ask(REQUESTS) == [[0]]


async def test_a_damaged_file_is_built_again(operator: Operator) -> None:
    await anyio.Path(operator.setup.database).write_bytes(b"not a database" * 1000)
    assert await operator.ask(REQUESTS) == [[0]]


async def test_a_trimmed_log_is_built_from_the_archive(operator: Operator, scribe: Any) -> None:
    scribe.prices()
    for _ in range(3):
        scribe.finished_request()
    await operator.append(scribe)
    archive = Archive(Path(operator.setup.archive), key=operator.setup.archive_key)
    shard = scribe.streams["RIFT_0"]
    manifest = archive.seal("RIFT_0", shard, last=len(shard))
    scribe.book(SegmentSealed(id="a", stream="RIFT_0", first=1, last=len(shard), manifest=manifest.sha256))
    scribe.finished_request()
    await operator.append(scribe)
    await operator.log.trim("RIFT_0", manifest.last)
    assert await operator.ask(REQUESTS) == [[4]]
    assert await operator.ask("select max(behind) from lag") == [[0]]


async def test_a_long_first_build_is_told(
    operator: Operator, scribe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scribe.prices()
    scribe.finished_request()
    await operator.append(scribe)
    monkeypatch.setattr(standbys, "SQL_CATCH_UP_S", 0.5)
    told = threading.Event()
    monkeypatch.setattr(Warehouse, "apply", lambda *_: told.wait(30))
    standby = Standby(operator.setup)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(standby.run)
        with anyio.fail_after(10):
            while standby._projection is None:  # noqa: ASYNC110  # until it has opened its file
                await anyio.sleep(0.02)
        why = "is being built: 0 of 7 records are applied; ask again in a minute"
        with pytest.raises(QuestionRefused, match=why):
            await standby.catch_up()
        told.set()
        tasks.cancel_scope.cancel()
    standby.warehouse.close()
    assert standby._log is not None
    await standby._log.close()


async def test_a_log_that_cannot_be_followed_is_told(operator: Operator) -> None:
    setup = SqlSetup(database=operator.setup.database, url="nats://127.0.0.1:1", archive="x")
    with pytest.raises(QuestionRefused, match="cannot follow the log: no NATS server answers at"):
        answer_of(Sql.topic, await ask_once(setup, "select 1"))


async def test_a_file_without_a_service_has_the_same_limits(tmp_path: Path) -> None:
    path = tmp_path / "rift.duckdb"
    opened = Warehouse.open(path)
    with pytest.raises(QuestionRefused, match="open in another process; stop that process first"):
        answer_of(Sql.topic, await ask_once(SqlSetup(str(path)), "select 1"))
    opened.close()
    answer = answer_of(Sql.topic, await ask_once(SqlSetup(str(path)), REQUESTS))
    assert answer == {"columns": ["count_star()"], "rows": [[0]]}
    with pytest.raises(QuestionRefused, match="more memory than a question may use"):
        answer_of(Sql.topic, await ask_once(SqlSetup(str(path)), "select len(range(400000000))"))


async def test_a_full_disk_is_named_and_the_next_question_is_answered_later(
    operator: Operator, scribe: Any, tmp_path: Path
) -> None:
    scribe.prices()
    for _ in range(50):
        scribe.finished_request()
    await operator.append(scribe)
    with small_disk(tmp_path / "disk", 16 << 20) as disk:
        setup = msgspec.structs.replace(operator.setup, database=str(disk.path / "sql.duckdb"))
        other = Operator(operator.log, setup)
        try:
            disk.fill()
            assert "no space left on" in await other.refused(REQUESTS)
            process = other.process
            disk.free()
            with anyio.fail_after(10):
                while True:
                    with contextlib.suppress(QuestionRefused):
                        assert await other.ask(REQUESTS) == [[50]]
                        break
                    await anyio.sleep(0.2)
            assert other.process == process, "the same process"
        finally:
            await other.host.kill()
