"""The events that a worker process publishes about its replica."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import pytest

from events import codec, shards, stream_fold, subjects
from events.fleet import Fleet
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


async def published(
    start: Callable[[], Awaitable[SimEngine]], then: Callable[[Shutdown], Awaitable[None]]
) -> list[Any]:
    """Return the fleet events of a worker that starts its engine with `start`, while `then` runs."""
    async with anyio.create_task_group() as tasks:
        broker = MemoryBroker(tasks, lambda: int(anyio.current_time() * 1e9))
        shutdown = Shutdown()
        tasks.start_soon(then, shutdown)
        with suppress(ExceptionGroup):
            await process.serve(MemoryLog(broker), start, STARTING, shutdown)
        tasks.cancel_scope.cancel()
    records = broker.stream(subjects.FLEET).after(0)
    return [event for stored in records for event in codec.decode(stored.data)[1]]


async def nothing(shutdown: Shutdown) -> None:
    """Never request a shutdown."""


async def good() -> SimEngine:
    return SimEngine(MODEL)


@pytest.mark.parametrize("request_shutdown", [Shutdown.retire, lambda shutdown: shutdown.drain(0.0)])
async def test_it_announces_draining_before_it_stops(request_shutdown: Callable[[Shutdown], None]) -> None:
    async def then(shutdown: Shutdown) -> None:
        await anyio.sleep(0.3)
        request_shutdown(shutdown)

    starting, ready, draining, stopped = await published(good, then)
    assert starting == STARTING
    assert isinstance(ready, ReplicaReady)
    assert isinstance(draining, ReplicaDraining)
    assert isinstance(stopped, ReplicaStopped)
    assert stopped.why == "drained"
    assert stopped.lived_ns > 250_000_000


async def test_an_engine_that_does_not_start_loses_the_replica() -> None:
    async def bad() -> SimEngine:
        raise EngineFailed("unknown\n  model" + "!" * 1000)

    _, lost = await published(bad, nothing)
    assert isinstance(lost, ReplicaLost)
    assert (lost.replica, lost.model, lost.cause) == ("r", "m", "engine")
    assert lost.why.startswith("unknown model!")
    assert len(lost.why) == replica.WHY_CHARACTERS


async def test_it_reports_while_its_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "REPLICA_REPORT_S", 0.1)

    async def slow() -> SimEngine:
        await anyio.sleep(0.35)
        raise EngineFailed("the engine failed after a while")

    events = await published(slow, nothing)
    assert events[1:-1] == [ReplicaReported(replica="r", model="m", running=0, waiting=0)] * 3


async def test_a_replica_that_is_declared_lost_exits() -> None:
    """Every other process has already replaced it."""
    async with anyio.create_task_group() as tasks:
        broker = MemoryBroker(tasks, lambda: int(anyio.current_time() * 1e9))

        async def declare_lost(name: str) -> None:
            lost = ReplicaLost(replica=name, model="m", why="silent for 36 s", cause="host")
            log = MemoryLog(broker)
            await log.append(subjects.FLEET, subjects.fleet("m"), codec.encode("autoscaler", [lost]))

        async def then() -> None:
            await anyio.sleep(0.1)
            await declare_lost("another")
            await anyio.sleep(0.1)
            await declare_lost("r")

        tasks.start_soon(then)
        with pytest.raises(ExceptionGroup) as failed, anyio.fail_after(5):
            await process.serve(MemoryLog(broker), good, STARTING, Shutdown())
        assert failed.group_contains(EngineFailed, match="declared lost: silent for 36 s")
        tasks.cancel_scope.cancel()


async def test_a_shutdown_during_the_engines_start_exits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def slow() -> SimEngine:
        await anyio.sleep(30)
        raise AssertionError("the process must not wait for its engine")

    async def then(shutdown: Shutdown) -> None:
        await anyio.sleep(0.1)
        shutdown.drain(10)

    def exit_process(status: int) -> None:
        raise EngineFailed(f"the process ends with {status}")

    monkeypatch.setattr(process.os, "_exit", exit_process)
    with anyio.fail_after(5):
        _, stopped, *_ = await published(slow, then)
    assert isinstance(stopped, ReplicaStopped)
    assert stopped.why == "not needed"


async def test_a_shard_that_does_not_answer_neither_keeps_a_replica_from_serving_nor_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica, "REPLICA_REPORT_S", 0.1)
    monkeypatch.setattr(process, "LOG_RETRY_S", 0.1)
    async with anyio.create_task_group() as tasks:
        broker = MemoryBroker(tasks, lambda: int(anyio.current_time() * 1e9), shards=3)
        log = MemoryLog(broker)
        silent = broker.streams.pop("RIFT_1")
        await shards.open_up_to(log, 3, writer="test")
        fleet = Fleet()
        shutdown = Shutdown()

        async def serve() -> None:
            await process.serve(log, good, STARTING, shutdown)
            ended.set()

        ended = anyio.Event()
        tasks.start_soon(serve)
        tasks.start_soon(partial(stream_fold.follow, log, subjects.FLEET, ["rift.fleet.>"], fleet))

        async def reported(shards: int) -> None:
            with anyio.fail_after(5):
                while not fleet.is_ready("m") or fleet.replicas["m"]["r"].shards != shards:  # noqa: ASYNC110
                    await anyio.sleep(0.02)

        await reported(1)
        broker.streams["RIFT_1"] = silent
        await reported(3)
        await shards.open_up_to(log, 4, writer="test")
        await anyio.sleep(0.3)
        shutdown.drain(0.0)
        with anyio.fail_after(5):
            await ended.wait()
        tasks.cancel_scope.cancel()
