"""A control process on a disk that is full or read-only: it leads, waits, says so, and continues."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from events import subjects
from events.jetstream import connect
from events.log import Stored
from events.publisher import Publisher
from events.schema import AccountOpened
from replay.archive.archive import Archive
from replay.warehouse import warehouse as warehouses
from replay.warehouse.warehouse import Warehouse
from rift.control import process
from rift.control.config import ControlConfig
from rift.control.duties import archiver as archivers
from rift.control.projection import projector, warehouse_host
from rift.data_dir import DataDir
from rift.nats_server import Address
from rift.rpc import (
    AskLeader,
    AskProblems,
    AskUsage,
    ProjectionBlocked,
    QuestionRefused,
    Rebuild,
    SealSegment,
    ask,
)
from tests.conftest import Server
from tests.replay.conftest import START_NS, ListLog
from tests.service import environment
from tests.small_disk import SmallDisk, small_disk

pytestmark = pytest.mark.anyio

USAGE = AskUsage("dev", "1970-01-01", "9999-12-31")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 32 << 20) as made:
        yield made


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try a full disk again every 0.1 s."""
    for module in (projector, warehouse_host):
        monkeypatch.setattr(module, "DISK_RETRY_S", 0.1)


@pytest.fixture
def log(scribe: Any) -> ListLog:
    scribe.prices()
    scribe.book(AccountOpened(id="account.dev", account="dev"))
    for _ in range(50):
        scribe.finished_request()
    return ListLog(scribe.streams)


def more(scribe: Any, log: Any, count: int = 300) -> None:
    for _ in range(count):
        scribe.finished_request()
    log.grow()


@asynccontextmanager
async def controlling(log: Any, folder: Path) -> AsyncIterator[None]:
    """Run control on the database and the archive in `folder`, until it leads."""
    archive = Archive(folder / "archive", key=b"k")
    stop = anyio.Event()
    async with anyio.create_task_group() as group:
        run = partial(process.run, log, folder / "db", archive, ControlConfig(), stop=stop)
        group.start_soon(run)
        with anyio.fail_after(5):
            while USAGE.topic not in log.handlers:  # noqa: ASYNC110
                await anyio.sleep(0.005)
        yield
        stop.set()


async def charged(log: Any) -> int:
    """Return the number of charged requests, as the customer reads it."""
    answer = await ask(log, USAGE, timeout_s=10)
    return sum(row["charged_requests"] for row in answer["data"])


async def until_answered(log: Any, within_s: float = 5.0) -> int:
    with anyio.fail_after(within_s):
        while True:
            try:
                return await charged(log)
            except ProjectionBlocked:
                await anyio.sleep(0.05)


def lines(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [message for message in caplog.messages if text in message]


def equal_to_a_whole_fold(database: Path, scribe: Any, tmp_path: Path) -> None:
    whole = Warehouse.open(tmp_path / "whole")
    for stream in (subjects.BOOK, "RIFT_0"):
        whole.apply(stream, scribe.streams[stream])
    used = Warehouse.open(database)
    assert used.digests()[0] == whole.digests()[0]
    assert list(used.failed_checks()) == []
    used.close()
    whole.close()


@pytest.mark.parametrize("checkpoints", ["default", "100KB"])
async def test_the_projection_waits_for_space_and_continues(
    disk: SmallDisk,
    log: Any,
    scribe: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: str,
) -> None:
    if checkpoints != "default":
        monkeypatch.setitem(warehouses.CONFIG, "checkpoint_threshold", checkpoints)
    caplog.set_level(logging.INFO)
    async with controlling(log, disk.path):
        assert await until_answered(log) == 50
        disk.fill(leave_bytes=0 if checkpoints == "default" else 200_000)
        more(scribe, log, 1000)
        with pytest.raises(ProjectionBlocked, match=r"no space left on .*disk \(0 MB free\)"):
            await charged(log)
        began = time.monotonic()
        assert (await ask(log, AskLeader(), timeout_s=1))["epoch"] == 1, "it leads"
        [problem] = await ask(log, AskProblems(), timeout_s=5)
        assert problem.startswith(f"the projection stopped: no space left on {disk.path} (")
        with pytest.raises(QuestionRefused, match=r"the archive cannot be written: no space left on"):
            await ask(log, SealSegment(), timeout_s=5)
        with pytest.raises(QuestionRefused, match=r"nothing was changed: no space left on"):
            await ask(log, Rebuild(), timeout_s=5)
        with pytest.raises(ProjectionBlocked):
            await charged(log)
        assert time.monotonic() - began < 5, "each is answered at once"
        disk.free()
        assert await until_answered(log) == 1050
        assert await ask(log, AskProblems(), timeout_s=5) == []
        more(scribe, log)
        assert await charged(log) == 1350
    assert len(lines(caplog, "the projection stopped: ")) == 1
    assert len(lines(caplog, "the projection continues")) == 1
    assert not [record for record in caplog.records if record.exc_info]
    equal_to_a_whole_fold(disk.path / "db", scribe, tmp_path)


async def test_control_starts_on_a_full_disk_and_projects_later(
    disk: SmallDisk, log: Any, scribe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    disk.fill(leave_bytes=4096)
    async with controlling(log, disk.path):
        with pytest.raises(ProjectionBlocked, match="no space left on"):
            await charged(log)
        [problem] = await ask(log, AskProblems(), timeout_s=5)
        assert "no space left on" in problem
        await anyio.sleep(0.3)
        disk.free()
        assert await until_answered(log) == 50
    assert len(lines(caplog, "stopped: ")) == len(lines(caplog, "the projection continues")) == 1
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == lines(
        caplog, "stopped: "
    )
    equal_to_a_whole_fold(disk.path / "db", scribe, tmp_path)


async def test_control_starts_on_a_read_only_disk_and_projects_later(
    disk: SmallDisk, log: Any, scribe: Any, tmp_path: Path
) -> None:
    async with controlling(log, disk.path):
        assert await until_answered(log) == 50
    more(scribe, log)
    disk.read_only()
    async with controlling(log, disk.path):
        with pytest.raises(ProjectionBlocked, match="read-only file system at"):
            await charged(log)
        disk.writable()
        assert await until_answered(log) == 350
    equal_to_a_whole_fold(disk.path / "db", scribe, tmp_path)


async def test_a_start_that_has_to_rebuild_waits_for_space(
    disk: SmallDisk, log: Any, scribe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log was trimmed, so only the archive holds the first records."""
    monkeypatch.setattr("rift.control.projection.warehouse_host.BUILD_RETRY_S", 0.2)
    archive = Archive(disk.path / "archive", key=b"k")
    for stream, records in scribe.streams.items():
        archive.seal(stream, records, last=len(records))
    kept = {stream: list(records) for stream, records in scribe.streams.items()}
    log.streams["RIFT_0"] = kept["RIFT_0"][100:]
    Warehouse.open(disk.path / "db").close()
    disk.fill(leave_bytes=131072)
    async with controlling(log, disk.path):
        with pytest.raises(ProjectionBlocked, match="no space left on"):
            await charged(log)
        disk.free()
        assert await until_answered(log) == 50
    scribe.streams["RIFT_0"] = kept["RIFT_0"]
    equal_to_a_whole_fold(disk.path / "db", scribe, tmp_path)


async def test_a_full_archive_trims_nothing_and_is_named_until_it_ends(
    disk: SmallDisk,
    log: Any,
    scribe: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The list log raises AttributeError at a trim, and refuses the anchor of any stream but the book."""
    caplog.set_level(logging.INFO)
    refuse = log.append

    async def append(stream: str, subject: str, data: bytes, **more: Any) -> int:
        if subject != subjects.ANCHORS + subjects.BOOK.lower():
            return int(await refuse(stream, subject, data, **more))
        log.streams[stream].append(Stored(subject, len(log.streams[stream]) + 1, START_NS, data))
        return len(log.streams[stream])

    monkeypatch.setattr(log, "append", append)
    for name, value in (("SEGMENT_AGE_S", 0.0), ("LOOK_S", 0.05), ("DISK_RETRY_S", 0.1)):
        monkeypatch.setattr(archivers, name, value)
    database = tmp_path / "own"
    database.mkdir()
    (database / "archive").symlink_to(disk.path)
    disk.fill()
    async with controlling(log, database):
        assert await until_answered(log) == 50
        with anyio.fail_after(5):
            while len(found := await ask(log, AskProblems(), timeout_s=5)) < 3:  # noqa: ASYNC110
                await anyio.sleep(0.05)
        assert "RIFT_0 is not archived, and so not trimmed: no space left on" in found[0]
        await anyio.sleep(0.5)
        assert len(lines(caplog, "RIFT_0 is not archived")) == 1
        assert Archive(disk.path, key=b"k").streams() == []
        disk.free()
        with anyio.fail_after(5):
            while Archive(disk.path, key=b"k").last("RIFT_0") == 0:  # noqa: ASYNC110
                await anyio.sleep(0.05)


async def open_accounts(address: Address, count: int) -> None:
    """Store more than the last page of the database's files has room for."""
    log = await connect(address.url, address.access("operator"), name="test")
    publisher = Publisher(log, "test")
    for number in range(count):
        account = f"account-{number}"
        await publisher.publish(AccountOpened(id=f"account.{account}", account=account), within_s=5)
    await log.close()


@pytest.mark.slow
def test_the_command_survives_a_full_disk_and_status_names_it(server: Server, disk: SmallDisk) -> None:
    """`rift control` on a data folder whose disk fills up, with its broker on another disk."""
    address = server.address
    options = ["--data", str(disk.path), "--nats", address.url]
    DataDir(disk.path).make()
    (disk.path / "rift.toml").write_text("broker_unchecked = true\n")

    def rift(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rift", *command, *options],
            capture_output=True,
            text=True,
            env=environment() | server.environment,
            timeout=60,
        )

    def problems() -> list[str]:
        done = rift("status", "--json")
        assert done.returncode == 1, "no gateway runs here"
        found: list[str] = json.loads(done.stdout)["problems"]
        return found

    def until(is_reached: Callable[[list[str]], bool]) -> list[str]:
        deadline = time.monotonic() + 20
        while not is_reached(found := problems()):
            assert time.monotonic() < deadline, (found, control_log.read_text())
        return found

    def logged(text: str) -> None:
        deadline = time.monotonic() + 20
        while text not in control_log.read_text():
            assert time.monotonic() < deadline, control_log.read_text()
            time.sleep(0.1)

    control_log = disk.path.with_name("control.log")
    disk.fill()
    with control_log.open("wb") as output:
        control = subprocess.Popen(
            [sys.executable, "-m", "rift", "control", "--engine", "sim", *options],
            stdout=output,
            stderr=output,
            env=environment() | server.environment,
        )
    try:
        logged("leads in epoch 1")
        logged(f"the projection stopped: no space left on {disk.path}")
        disk.free()
        logged("the projection continues")
        disk.fill()
        anyio.run(partial(open_accounts, address, 200))
        found = until(lambda found: len(found) == 2)
        assert found[0].startswith(f"the projection stopped: no space left on {disk.path} (0 MB free)")
        done = rift("invoice", "--account", "account-1", "--period", "2026-11")
        assert done.returncode == 1
        assert "no space left on" in done.stderr
        assert "Traceback" not in done.stderr
        disk.free()
        until(lambda found: found == ["no gateway is alive"])
        assert control.poll() is None, "the same process"
    finally:
        control.terminate()
        control.wait(10)
    text = control_log.read_text()
    assert "Traceback" not in text
    assert text.count("the projection stopped: ") == text.count("the projection continues") == 2
