"""The worker process: it starts an engine and serves a share of each shard until it is shut down."""

import gc
import os
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial

import anyio

from events import subjects
from events.log import Log, LogError
from events.schema import ReplicaStarting
from rift.engines import Engine
from rift.worker.claims import Load
from rift.worker.replica import ReplicaAnnouncer
from rift.worker.shutdown import Shutdown
from rift.worker.worker import Worker, WorkerConfig, open_worker

LOG_RETRY_S = 1.0


async def serve(
    log: Log,
    start_engine: Callable[[], Awaitable[Engine]],
    starting: ReplicaStarting,
    *,
    shards: int,
    shutdown: Shutdown,
) -> None:
    """Start the engine and serve until the shutdown. Raises EngineFailed, LogError."""
    replica = ReplicaAnnouncer(log, starting)
    sequence = await replica.starting()
    engine: Engine | None = None
    workers: list[Worker] = []
    last_words: Callable[[], Awaitable[None]] | None = None
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(replica.report, lambda: sum((worker.claims.load for worker in workers), Load()))
            tasks.start_soon(replica.watch_for_loss, sequence)
            engine = await _start(start_engine, replica, shutdown)
            # Without this, each full collection would scan the millions of objects that the engine imported,
            # for half a second, while every stream waits.
            gc.freeze()
            await _wait_for_log(log)
            async with AsyncExitStack() as stack:
                for shard in range(shards):
                    config = WorkerConfig(
                        name=replica.name,
                        model=subjects.slug(replica.model),
                        shard=shard,
                        slots=max(1, engine.slots // shards),
                        entropy=secrets.token_bytes,
                    )
                    worker = open_worker(log, engine, config, shutdown)
                    workers.append(await stack.enter_async_context(worker))
                await _run(workers, engine, replica, shutdown)
            tasks.cancel_scope.cancel()
        last_words = partial(replica.stopped, "drained")
    except Exception as error:
        last_words = partial(replica.lost, error)
        raise
    finally:
        with anyio.CancelScope(shield=True):
            if last_words is not None:
                await last_words()
            if engine is not None:
                await engine.close()


async def _start(
    start_engine: Callable[[], Awaitable[Engine]], replica: ReplicaAnnouncer, shutdown: Shutdown
) -> Engine:
    """Start the engine; exit at once if the shutdown comes first.

    A start cannot be cancelled cleanly, and the processes that it began end with our process group.
    """

    async def exit_early() -> None:
        await shutdown.wait()
        await replica.stopped("not needed")
        os._exit(0)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(exit_early)
        engine = await start_engine()
        tasks.cancel_scope.cancel()
    return engine


async def _wait_for_log(log: Log) -> None:
    """Wait for the log, so that a broker's restart does not cost an engine that took minutes to start."""
    while True:
        try:
            await log.last_sequence(subjects.FLEET)
            return
        except LogError:
            await anyio.sleep(LOG_RETRY_S)


async def _run(
    workers: Sequence[Worker], engine: Engine, replica: ReplicaAnnouncer, shutdown: Shutdown
) -> None:
    async def announce() -> None:
        async with anyio.create_task_group() as announcing:
            announcing.start_soon(replica.ready, engine)
            await shutdown.wait()
            announcing.cancel_scope.cancel()
        await replica.draining()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(announce)
        for worker in workers:
            tasks.start_soon(worker.run)
