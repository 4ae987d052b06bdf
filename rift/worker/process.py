"""The worker process: an engine, its replica's life in the fleet's stream, and a share of each shard."""

import contextlib
import gc
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Literal

import anyio

from events import codec, subjects
from events.log import Log, LogError, append_until_known
from events.schema import (
    AnyEvent,
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
    ReplicaReported,
    ReplicaStarting,
    ReplicaStopped,
)
from rift.engines import Engine, EngineFailed
from rift.worker.claims import Load
from rift.worker.shutdown import Shutdown
from rift.worker.worker import Worker

# A broker's restart is waited out; for the last words of a worker that goes there is less time.
FLEET_APPEND_S = 60.0
LAST_WORD_S = 2.0

# Who is silent for 35 s is given up: three reports may be late or lost.
REPORT_S = 10.0

# What a reader of the fleet is told of a failure: a line, however long an engine's own words are.
WHY_CHARACTERS = 300


async def serve(
    log: Log,
    start_engine: Callable[[], Awaitable[Engine]],
    starting: ReplicaStarting,
    *,
    shards: int,
    leaving: Shutdown,
) -> None:
    """Start the engine and serve until told to leave. Raises EngineFailed, LogError."""
    replica = _Replica(log, starting)
    began = await replica.say(starting, within_s=FLEET_APPEND_S)
    engine: Engine | None = None
    last: AnyEvent | None = None
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(replica.report)
            tasks.start_soon(replica.heed, began)
            engine = await _started(start_engine, replica, leaving)
            # What an engine imported stays: millions of objects that the collector need not look at again,
            # for half a second each time, while every stream waits.
            gc.freeze()
            await _log_answers(log)
            await _serve(log, engine, replica, shards=shards, leaving=leaving)
            tasks.cancel_scope.cancel()
        last = replica.stopped("drained")
    except Exception as error:
        last = replica.lost(error)
        raise
    finally:
        with anyio.CancelScope(shield=True):
            if last is not None:
                await replica.say_at_last(last)
            if engine is not None:
                await engine.close()


async def _started(
    start_engine: Callable[[], Awaitable[Engine]], replica: "_Replica", leaving: Shutdown
) -> Engine:
    """Start the engine. Who is told to leave meanwhile ends at once: a start cannot be stopped in an orderly
    way, and whatever it began ends with our process group."""

    async def leave() -> None:
        await leaving.wait()
        await replica.say_at_last(replica.stopped("not needed"))
        os._exit(0)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(leave)
        engine = await start_engine()
        tasks.cancel_scope.cancel()
    return engine


async def _serve(log: Log, engine: Engine, replica: "_Replica", *, shards: int, leaving: Shutdown) -> None:
    opened = anyio.Event()

    async def announce() -> None:
        await opened.wait()
        await replica.say(replica.ready(engine), within_s=FLEET_APPEND_S)
        await leaving.wait()
        await replica.say_at_last(ReplicaDraining(replica=replica.name, model=replica.model))

    replica.workers = [
        Worker(
            log,
            engine,
            name=replica.name,
            model=subjects.slug(replica.model),
            shard=shard,
            slots=max(1, engine.slots // shards),
            entropy=secrets.token_bytes,
        )
        for shard in range(shards)
    ]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(announce)
        for worker in replica.workers:
            tasks.start_soon(partial(worker.run, opened=opened.set, leaving=leaving))


class _Replica:
    """What the replica says of itself."""

    def __init__(self, log: Log, starting: ReplicaStarting) -> None:
        self.name = starting.replica
        self.model = starting.model
        self.workers: Sequence[Worker] = ()
        self._log = log
        self._subject = subjects.fleet(subjects.slug(starting.model))
        self._began_at = anyio.current_time()

    async def say(self, event: AnyEvent, *, within_s: float) -> int:
        """Raises LogError."""
        data = codec.encode(self.name, [event])
        return await append_until_known(self._log, subjects.FLEET, self._subject, data, within_s=within_s)

    async def say_at_last(self, event: AnyEvent) -> None:
        """What a log that does not answer is not told, its silence will."""
        with anyio.move_on_after(LAST_WORD_S), contextlib.suppress(LogError):
            await self.say(event, within_s=LAST_WORD_S)

    async def heed(self, began: int) -> None:
        """Raise EngineFailed once somebody gave this replica up: all take it for lost, whatever it does, so
        another has to take its place."""
        async with self._log.follow(subjects.FLEET, [self._subject], after=began) as reader:
            async for batch in reader:
                for stored in batch:
                    for event in codec.decode(stored.data)[1]:
                        if isinstance(event, ReplicaLost) and event.replica == self.name:
                            raise EngineFailed(f"this replica was given up: {event.why}")

    async def report(self) -> None:
        """Say every so often that the replica lives, and with how much work; a report that is not stored by
        the next one is let go of."""
        while True:
            await anyio.sleep(REPORT_S)
            load = sum((worker.load for worker in self.workers), Load())
            event = ReplicaReported(
                replica=self.name,
                model=self.model,
                running=load.running,
                waiting=load.waiting,
                kv_used_tokens=load.tokens,
            )
            with anyio.move_on_after(REPORT_S), contextlib.suppress(LogError):
                await self._log.append(subjects.FLEET, self._subject, codec.encode(self.name, [event]))

    def ready(self, engine: Engine) -> ReplicaReady:
        return ReplicaReady(
            replica=self.name,
            model=self.model,
            slots=engine.slots,
            context_tokens=engine.context_tokens,
            start_ns=self._lived_ns(),
        )

    def stopped(self, why: str) -> ReplicaStopped:
        return ReplicaStopped(replica=self.name, model=self.model, why=why, lived_ns=self._lived_ns())

    def lost(self, error: BaseException) -> ReplicaLost:
        """A log that does not answer is the host's failure, whatever else is the engine's."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        words = " ".join(str(error).split()) or type(error).__name__
        cause: Literal["host", "engine"] = "host" if isinstance(error, LogError) else "engine"
        return ReplicaLost(replica=self.name, model=self.model, why=words[:WHY_CHARACTERS], cause=cause)

    def _lived_ns(self) -> int:
        return int((anyio.current_time() - self._began_at) * 1e9)


async def _log_answers(log: Log) -> None:
    """Wait for the log: an engine that took minutes to start is not thrown away for a broker's restart."""
    while True:
        try:
            await log.last_sequence(subjects.FLEET)
            return
        except LogError:
            await anyio.sleep(1)
