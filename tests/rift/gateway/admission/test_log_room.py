"""New requests are refused while the embedded broker's disk is full, before the log fails."""

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from events.memory import MemoryBroker, MemoryLog
from rift.gateway.admission.log_room import LogRoom
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.state import GatewayConfig
from rift.gateway.streams.log_health import LogHealth
from rift.log_disk.reserve import RESERVE_BYTES, Reserve
from tests.simulation.processes import MODELS, SECRET


@pytest.mark.anyio
async def test_a_released_reserve_refuses_and_a_restored_one_admits(tmp_path: Path) -> None:
    file = tmp_path / "reserve"
    async with watched(Reserve(file)) as room:
        room.check()
        file.touch()
        await until(lambda: is_full(room))
        with file.open("wb") as opened:
            opened.truncate(RESERVE_BYTES)
        await until(lambda: not is_full(room))


@pytest.mark.anyio
async def test_a_gateway_that_starts_on_a_full_disk_refuses_at_once(tmp_path: Path) -> None:
    (tmp_path / "reserve").touch()
    async with watched(Reserve(tmp_path / "reserve")) as room:
        assert is_full(room)


@pytest.mark.anyio
async def test_a_disk_that_does_not_answer_stops_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answered = threading.Event(), threading.Event()

    def hang(reserve: Reserve) -> bool:
        asked.set()
        return answered.wait(10)

    async with watched(Reserve(tmp_path / "reserve")) as room:
        monkeypatch.setattr(Reserve, "is_whole", hang)
        await until(asked.is_set)
        room.check()
    answered.set()


@asynccontextmanager
async def watched(reserve: Reserve) -> AsyncIterator[LogRoom]:
    async with anyio.create_task_group() as tasks:
        log = MemoryLog(MemoryBroker(tasks, lambda: 0))
        config = GatewayConfig(
            lane="lane", secret=SECRET, models=MODELS, served=(), entropy=bytes, reserve=reserve
        )
        room = LogRoom(log, config, LogHealth(log, 0), anyio.Event())
        tasks.start_soon(room.watch_reserve)
        yield room
        tasks.cancel_scope.cancel()


def is_full(room: LogRoom) -> bool:
    try:
        room.check()
    except HTTPError as refused:
        return (refused.status, refused.code) == (503, "log_full")
    return False


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not condition():  # noqa: ASYNC110  # a thread
            await anyio.sleep(0.01)
