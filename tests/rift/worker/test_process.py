"""A replica's life in the fleet's stream, from its own mouth."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest

from events import codec, subjects
from events.memory import MemoryBroker, MemoryLog
from events.schema import (
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
    ReplicaReported,
    ReplicaStarting,
    ReplicaStopped,
)
from rift.catalogue import Model
from rift.engines import EngineFailed
from rift.engines.sim import SimEngine
from rift.worker import process, replica
from rift.worker.shutdown import Shutdown

pytestmark = pytest.mark.anyio

STARTING = ReplicaStarting(replica="r", model="m", engine="sim")
MODEL = Model(source="sim", context_tokens=64, prompt_usd="0.1", output_usd="0.1")


async def said(
    start: Callable[[], Awaitable[SimEngine]], then: Callable[[Shutdown], Awaitable[None]]
) -> list[Any]:
    """Return what a worker says whose engine starts so, and to which this happens then."""
    async with anyio.create_task_group() as tasks:
        broker = MemoryBroker(tasks, lambda: int(anyio.current_time() * 1e9))
        leaving = Shutdown()
        tasks.start_soon(then, leaving)
        with suppress(ExceptionGroup):
            await process.serve(MemoryLog(broker), start, STARTING, shards=1, shutdown=leaving)
        tasks.cancel_scope.cancel()
    records = broker.stream(subjects.FLEET).behind(0)
    return [event for stored in records for event in codec.decode(stored.data)[1]]


async def nothing(leaving: Shutdown) -> None:
    """Nobody tells it to go."""


async def good() -> SimEngine:
    return SimEngine(MODEL)


@pytest.mark.parametrize("word", [Shutdown.retire, lambda leaving: leaving.drain(0.0)])
async def test_it_says_that_it_goes_before_it_is_gone(word: Callable[[Shutdown], None]) -> None:
    async def then(leaving: Shutdown) -> None:
        await anyio.sleep(0.3)
        word(leaving)

    starting, ready, draining, stopped = await said(good, then)
    assert starting == STARTING
    assert isinstance(ready, ReplicaReady)
    assert isinstance(draining, ReplicaDraining)
    assert isinstance(stopped, ReplicaStopped)
    assert stopped.why == "drained"
    assert stopped.lived_ns > 250_000_000


async def test_an_engine_that_does_not_start_is_a_replica_lost_by_it() -> None:
    async def bad() -> SimEngine:
        raise EngineFailed("there is\n  no such model" + "!" * 1000)

    _, lost = await said(bad, nothing)
    assert isinstance(lost, ReplicaLost)
    assert (lost.replica, lost.model, lost.cause) == ("r", "m", "engine")
    assert lost.why.startswith("there is no such model!")
    assert len(lost.why) == replica.WHY_CHARACTERS


async def test_it_reports_from_its_start_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "REPLICA_REPORT_S", 0.1)

    async def slow() -> SimEngine:
        await anyio.sleep(0.35)
        raise EngineFailed("in the end it did not")

    events = await said(slow, nothing)
    assert events[1:-1] == [ReplicaReported(replica="r", model="m", running=0, waiting=0)] * 3


async def test_one_that_was_given_up_ends() -> None:
    """All take it for lost, whatever it does: another has to take its place."""
    async with anyio.create_task_group() as tasks:
        broker = MemoryBroker(tasks, lambda: int(anyio.current_time() * 1e9))

        async def give_up(name: str) -> None:
            lost = ReplicaLost(replica=name, model="m", why="silent for 36 s", cause="host")
            log = MemoryLog(broker)
            await log.append(subjects.FLEET, subjects.fleet("m"), codec.encode("autoscaler", [lost]))

        async def then() -> None:
            await anyio.sleep(0.1)
            await give_up("another")
            await anyio.sleep(0.1)
            await give_up("r")

        tasks.start_soon(then)
        with pytest.raises(ExceptionGroup) as failed, anyio.fail_after(5):
            await process.serve(MemoryLog(broker), good, STARTING, shards=1, shutdown=Shutdown())
        assert failed.group_contains(EngineFailed, match="declared lost: silent for 36 s")
        tasks.cancel_scope.cancel()


async def test_told_to_go_while_its_engine_starts_it_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow() -> SimEngine:
        await anyio.sleep(30)
        raise AssertionError("it was not waited for")

    async def then(leaving: Shutdown) -> None:
        await anyio.sleep(0.1)
        leaving.drain(10)

    def gone(status: int) -> None:
        raise EngineFailed(f"the process ends with {status}")

    monkeypatch.setattr(process.os, "_exit", gone)
    with anyio.fail_after(5):
        _, stopped, *_ = await said(slow, then)
    assert isinstance(stopped, ReplicaStopped)
    assert stopped.why == "not needed"
