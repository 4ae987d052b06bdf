"""The worker process: it starts an engine and serves a share of each shard until it is shut down."""

import gc
import os
import secrets
from collections.abc import Awaitable, Callable
from functools import partial

import anyio
from anyio.abc import TaskGroup
from msgspec.structs import replace

from events import shards, subjects
from events.log import Log, LogError
from events.schema import ReplicaStarting
from rift.engines import Engine
from rift.metrics import worker as worker_metrics
from rift.metrics.address import Address
from rift.worker.replica import ReplicaAnnouncer
from rift.worker.serving import Serving
from rift.worker.shutdown import Shutdown
from rift.worker.slots import UNBOUNDED, Slots
from rift.worker.worker import WorkerConfig, open_worker

LOG_RETRY_S = 1.0


async def serve(
    log: Log,
    start_engine: Callable[[], Awaitable[Engine]],
    starting: ReplicaStarting,
    shutdown: Shutdown,
    *,
    metrics: Address | None = None,
    unfilled_max: int = UNBOUNDED,
) -> None:
    """Start the engine and serve until the shutdown. Raises EngineFailed, LogError.

    The replica takes no requests while `unfilled_max` tokens of prompts wait in its engine.
    """
    serving = Serving(unfilled_max=unfilled_max)
    async with worker_metrics.served(metrics, log, starting, serving) as address:
        replica = ReplicaAnnouncer(log, replace(starting, metrics=address))
        await _serve(log, start_engine, replica, shutdown, serving)


async def _serve(
    log: Log,
    start_engine: Callable[[], Awaitable[Engine]],
    replica: ReplicaAnnouncer,
    shutdown: Shutdown,
    serving: Serving,
) -> None:
    sequence = await replica.starting()
    engine: Engine | None = None
    last_words: Callable[[], Awaitable[None]] | None = None
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(replica.report, serving.workers)
            tasks.start_soon(replica.watch_for_loss, sequence)
            engine = await _start(start_engine, replica, shutdown)
            # Without this, each full collection would scan the millions of objects that the engine imported,
            # for half a second, while every stream waits.
            gc.freeze()
            await serve_shards(log, engine, replica, shutdown, serving)
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


async def serve_shards(
    log: Log,
    engine: Engine,
    replica: ReplicaAnnouncer,
    shutdown: Shutdown,
    serving: Serving,
    entropy: Callable[[int], bytes] = secrets.token_bytes,
) -> None:
    """Serve every shard, also those that are opened meanwhile, until the shutdown; `serving` gets the parts.

    Raises EngineFailed, LogError.
    """
    slots = serving.slots = Slots(engine.slots, shutdown, unfilled_max=serving.unfilled_max)
    serving.engine = engine
    engine.after_step.append(slots.step)
    model = subjects.slug(replica.model)

    async def serve_shard(shard: int) -> None:
        config = WorkerConfig(replica.name, model, shard, slots, entropy)
        async with open_worker(log, engine, config) as worker:
            serving.workers.append(worker)
            first.set()
            await worker.run()

    async def begin(shard: int) -> None:
        stream = subjects.shard_stream(shard)
        await _answered(lambda: log.last_sequence(stream))
        tasks.start_soon(serve_shard, shard)

    async def announce() -> None:
        await first.wait()
        serving.state = "ready"
        await replica.ready(engine)

    async def begin_all(beginning: TaskGroup) -> None:
        def start(shard: int) -> None:
            beginning.start_soon(begin, shard)

        opened = await _answered(lambda: shards.count(log))
        for shard in range(opened):
            start(shard)
        await shards.follow(log, opened, start)

    async def until_shutdown() -> None:
        async with anyio.create_task_group() as beginning:
            beginning.start_soon(begin_all, beginning)
            beginning.start_soon(announce)
            await shutdown.wait()
            beginning.cancel_scope.cancel()
        serving.state = "draining"
        await replica.draining()

    first = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(until_shutdown)


async def _answered(ask: Callable[[], Awaitable[int]]) -> int:
    """Repeat a question until the log answers, so that a broker's restart does not cost an engine that took
    minutes to start."""
    while True:
        try:
            return await ask()
        except LogError:
            await anyio.sleep(LOG_RETRY_S)
