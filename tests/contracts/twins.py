"""The two logs that the contracts are held against, and how their tests read them."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, NamedTuple

import anyio

from events import memory
from events.jetstream import connect
from events.log import Follower, Job, Jobs, Log, Stored

STREAM, SMALL_STREAM = "RIFT_0", "RIFT_9"
SMALL_BYTES = 20_000
MIB = 1024 * 1024


class Twin(NamedTuple):
    """A log, and how to get another connection to it."""

    log: Log
    connect: Callable[[], Awaitable[Log]]


@asynccontextmanager
async def in_memory() -> AsyncIterator[Twin]:
    ticks = count(1_750_000_000_000_000_000)
    async with anyio.create_task_group() as tasks:
        broker = memory.MemoryBroker(tasks, lambda: next(ticks), shards=10)
        broker.streams[SMALL_STREAM].bytes_max = SMALL_BYTES

        async def another() -> Log:
            return memory.connect(broker)

        yield Twin(memory.connect(broker), another)


@asynccontextmanager
async def on_nats(server: Any) -> AsyncIterator[Twin]:
    opened = []

    async def another() -> Log:
        log = await connect(server.address.url, server.address.access("admin"), name="contract")
        opened.append(log)
        return log

    log = await connect(server.address.url, server.address.access("admin"), name="contract")
    await log.ensure_streams(shards=1, replicas=1, max_bytes=64 * MIB)
    await log.client.request(
        f"$JS.API.STREAM.CREATE.{SMALL_STREAM}",
        b'{"name":"RIFT_9","subjects":["rift.9.>"],"max_bytes":%d,"discard":"new","storage":"file"}'
        % SMALL_BYTES,
    )
    yield Twin(log, another)
    for connection in (log, *opened):
        await connection.close()


async def read(follower: Follower, wanted: int) -> list[Stored]:
    found: list[Stored] = []
    with anyio.fail_after(20):
        async for batch in follower:
            assert batch, "a batch has at least one message"
            assert follower.position == batch[-1].sequence
            found += batch
            if len(found) >= wanted:
                break
    return found


async def scan(log: Log, topics: Sequence[str], *, first: int, target: int) -> list[Stored]:
    return [s async for batch in log.scan(STREAM, topics, first=first, target=target) for s in batch]


async def append_many(log: Log, subject: str, many: int) -> list[int]:
    return [await log.append(STREAM, subject, b"%d" % n) for n in range(many)]


async def take(jobs: Jobs, many: int) -> list[Job]:
    jobs.want(many)
    with anyio.fail_after(10):
        return [await anext(aiter(jobs)) for _ in range(many)]


async def comes_nothing(jobs: Jobs, within_s: float = 0.3) -> bool:
    with anyio.move_on_after(within_s) as none:
        await anext(aiter(jobs))
    return none.cancelled_caught
