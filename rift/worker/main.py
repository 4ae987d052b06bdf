"""The worker process: an engine, its replica's life in the fleet's stream, and a share of each shard."""

import contextlib
import gc
import secrets
from collections.abc import Awaitable, Callable
from functools import partial

import anyio

from events import codec, subjects
from events.log import Log, LogError, append_until_known
from events.schema import AnyEvent, ReplicaReady, ReplicaStarting, ReplicaStopped
from rift import catalogue
from rift.engines import Engine
from rift.worker.worker import Worker

# A broker's restart is waited out; for the last word of a worker that stops there is less time.
FLEET_APPEND_S = 60.0
LAST_WORD_S = 2.0


async def serve(
    log: Log,
    start_engine: Callable[[], Awaitable[Engine]],
    starting: ReplicaStarting,
    *,
    shards: int,
    drain: anyio.Event,
    drain_s: float,
) -> None:
    """Start the engine and serve until `drain` is set. Raises EngineFailed, LogError."""

    async def say(event: AnyEvent) -> None:
        data = codec.encode(starting.replica, [event])
        subject = subjects.fleet(catalogue.slug(starting.model))
        await append_until_known(log, subjects.FLEET, subject, data, within_s=FLEET_APPEND_S)

    await say(starting)
    began_at = anyio.current_time()
    engine = await start_engine()
    # What an engine imported stays: millions of objects that the collector need not look at again, for
    # half a second each time, while every stream waits.
    gc.freeze()
    await _log_answers(log)
    why = "failed"
    try:
        opened = anyio.Event()

        async def announce() -> None:
            await opened.wait()
            await say(
                ReplicaReady(
                    replica=starting.replica,
                    model=starting.model,
                    slots=engine.slots,
                    context_tokens=engine.context_tokens,
                    start_ns=int((anyio.current_time() - began_at) * 1e9),
                )
            )

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(announce)
            for shard in range(shards):
                worker = Worker(
                    log,
                    engine,
                    name=starting.replica,
                    model=catalogue.slug(starting.model),
                    shard=shard,
                    slots=max(1, engine.slots // shards),
                    entropy=secrets.token_bytes,
                )
                tasks.start_soon(partial(worker.run, opened=opened.set, drain=drain, drain_s=drain_s))
        why = "drained"
    finally:
        with (
            anyio.CancelScope(shield=True),
            anyio.move_on_after(LAST_WORD_S),
            contextlib.suppress(LogError),
        ):
            await say(ReplicaStopped(replica=starting.replica, model=starting.model, why=why))
        await engine.close()


async def _log_answers(log: Log) -> None:
    """Wait for the log: an engine that took minutes to start is not thrown away for a broker's restart."""
    while True:
        try:
            await log.last_sequence(subjects.FLEET)
            return
        except LogError:
            await anyio.sleep(1)
