"""A replica's life in the fleet's stream: the events that a worker process publishes about itself."""

from collections.abc import Collection, Sequence
from itertools import count
from typing import Literal

import anyio

from events import codec, subjects
from events.clock import now_s
from events.contracts import REPLICA_REPORT_S, SECOND_NS
from events.log import Log, LogError
from events.publisher import Publisher
from events.schema import (
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
    ReplicaReported,
    ReplicaStarting,
    ReplicaStopped,
)
from rift.engines import Engine, EngineFailed
from rift.errors import first_error
from rift.worker.claims import Load
from rift.worker.worker import Worker

# Long enough for a broker's restart; a worker that exits has less time.
APPEND_S = 60.0
LAST_APPEND_S = 2.0
RETRY_S = 1.0

# Readers of the fleet see one line of a failure, however long an engine's own message is.
WHY_CHARACTERS = 300


class ReplicaAnnouncer:
    def __init__(self, log: Log, starting: ReplicaStarting) -> None:
        self.model = starting.model
        self.name = starting.replica
        self._log = log
        self._publisher = Publisher(log, starting.replica)
        self._starting = starting
        self._began_at_s = now_s()

    async def starting(self) -> int:
        """Publish the start and return its sequence. Raises LogError."""
        return await self._publisher.publish(self._starting, within_s=APPEND_S)

    async def ready(self, engine: Engine) -> None:
        """Publish that the replica is ready; return once that is stored.

        An engine takes minutes to start, so an outage of the log must not end it.
        """
        event = ReplicaReady(
            replica=self.name,
            model=self.model,
            slots=engine.slots,
            context_tokens=engine.context_tokens,
            start_ns=self._lived_ns(),
        )
        while not await self._publisher.try_publish(event, within_s=APPEND_S):  # noqa: ASYNC110
            await anyio.sleep(RETRY_S)

    async def draining(self) -> None:
        await self._try_publish(ReplicaDraining(replica=self.name, model=self.model))

    async def stopped(self, why: str) -> None:
        event = ReplicaStopped(replica=self.name, model=self.model, why=why, lived_ns=self._lived_ns())
        await self._try_publish(event)

    async def lost(self, error: BaseException) -> None:
        """Publish the cause: an unavailable log is the host's failure, any other error the engine's."""
        error = first_error(error)
        why = " ".join(str(error).split()) or type(error).__name__
        cause: Literal["host", "engine"] = "host" if isinstance(error, LogError) else "engine"
        await self._try_publish(
            ReplicaLost(replica=self.name, model=self.model, why=why[:WHY_CHARACTERS], cause=cause)
        )

    async def report(self, workers: Sequence[Worker]) -> None:
        """Publish the replica's load and the number of first shards that it serves, every REPLICA_REPORT_S. A
        report that is late is dropped."""
        while True:
            await anyio.sleep(REPLICA_REPORT_S)
            current = sum((worker.claims.load for worker in workers), Load())
            event = ReplicaReported(
                replica=self.name,
                model=self.model,
                running=current.running,
                waiting=current.waiting,
                kv_used_tokens=current.tokens,
                shards=_first_shards({worker.shard for worker in workers}),
            )
            with anyio.move_on_after(REPLICA_REPORT_S):
                await self._publisher.try_publish(event, within_s=0)

    async def watch_for_loss(self, starting: int) -> None:
        """Raise EngineFailed once another process declares this replica lost, after sequence `starting`.

        Everyone else has already replaced it by then.
        """
        subject = subjects.fleet(subjects.slug(self.model))
        async with self._log.follow(subjects.FLEET, [subject], after=starting) as reader:
            async for batch in reader:
                for stored in batch:
                    for event in codec.decode(stored.data, stored.subject)[1]:
                        if isinstance(event, ReplicaLost) and event.replica == self.name:
                            raise EngineFailed(f"this replica was declared lost: {event.why}")

    async def _try_publish(self, event: ReplicaDraining | ReplicaStopped | ReplicaLost) -> None:
        """Best effort: if the log is down, the missing reports say the same."""
        with anyio.move_on_after(LAST_APPEND_S):
            await self._publisher.try_publish(event, within_s=LAST_APPEND_S)

    def _lived_ns(self) -> int:
        return int((now_s() - self._began_at_s) * SECOND_NS)


def _first_shards(served: Collection[int]) -> int:
    """Return how many shards from 0 on are served without a gap; at least 1, as shard 0 always will be."""
    return next(shard for shard in count(1) if shard not in served)
