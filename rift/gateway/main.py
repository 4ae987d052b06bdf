"""The gateway process: one lane, the book and the fleet followed, and the server in front."""

import secrets
from typing import Any

import anyio

from events import book as books
from events import codec, fleet, ids, subjects
from events.log import Log, append_until_known
from events.schema import LaneOpened
from rift.catalogue import Catalogue
from rift.gateway.app import STOPPING, Gateway
from rift.gateway.relay import Relay
from rift.gateway.server import serve

# The broker is there when a gateway starts; opening the lane waits out a restart.
OPEN_S = 30.0

# From the word to stop until the server stops: enough for each stream's last frame.
LAST_FRAMES_S = 0.5


async def run(
    log: Log,
    *,
    host: str,
    port: int,
    models: Catalogue,
    default_model: str,
    secret: bytes,
    stop: anyio.Event,
) -> None:
    """Serve until `stop` is set. Raises LogError, OSError (the port), codec.RecordUnreadable."""
    shard, lane = 0, ids.new_lane_id(secrets.token_bytes(ids.RANDOM_BYTES))
    known, replicas = await books.read(log), await fleet.read(log)
    opened = codec.encode(lane, [LaneOpened(lane=lane, shard=shard)])
    stream = subjects.shard_stream(shard)
    await append_until_known(log, stream, subjects.lane(shard, lane), opened, within_s=OPEN_S)
    relay = Relay(log, shard=shard, lane=lane)
    async with anyio.create_task_group() as tasks:
        reading = anyio.Event()
        tasks.start_soon(lambda: relay.run(opened=reading.set))
        tasks.start_soon(_follow, log, subjects.BOOK, "rift.book.>", known)
        tasks.start_soon(_follow, log, subjects.FLEET, "rift.fleet.>", replicas)
        await reading.wait()
        gateway = Gateway(
            log,
            relay,
            book=known,
            fleet=replicas,
            models=models,
            default_model=default_model,
            secret=secret,
            lane=(shard, lane),
            entropy=secrets.token_bytes,
            tasks=tasks,
        )

        async def stopped() -> None:
            await stop.wait()
            relay.break_off_all(STOPPING)
            await anyio.sleep(LAST_FRAMES_S)

        await serve(gateway, host=host, port=port, stopped=stopped)
        tasks.cancel_scope.cancel()


async def _follow(log: Log, stream: str, topic: str, fold: Any) -> None:
    """Keep a fold of one stream current for as long as the gateway lives."""
    async with log.follow(stream, [topic], after=fold.position) as reader:
        async for batch in reader:
            for stored in batch:
                fold.fold(stored)
