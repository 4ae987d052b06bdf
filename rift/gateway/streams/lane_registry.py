"""The lanes that one gateway reads: always its own, and others while clients resume requests there."""

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Self

import anyio
from anyio.abc import TaskGroup, TaskStatus

from events import subjects
from events.log import Log, LogError
from events.request_history import HistoryReader
from events.schema import Problem
from rift.gateway.bounds import Bound
from rift.gateway.streams.lane_reader import BUFFERED_BYTES_MAX, LaneReader

# Another gateway's lane without subscriptions is read this much longer: the next client to resume there
# often comes soon.
IDLE_S = 30.0


class LaneRegistry:
    """`own` reads the gateway's own lane."""

    def __init__(
        self, log: Log, histories: HistoryReader, own: LaneReader, *, lane: tuple[int, str], tasks: TaskGroup
    ) -> None:
        self._log = log
        self._histories = histories
        self._tasks = tasks
        self.own = own
        self._readers = {lane: own}
        self._opening = anyio.Lock()
        # The number of openings that failed.
        self._failures = 0

    @classmethod
    async def open(
        cls, log: Log, histories: HistoryReader, *, shard: int, lane: str, tasks: TaskGroup
    ) -> Self:
        """Start reading the gateway's own lane in `tasks`. Raises LogError."""

        async def read(*, task_status: TaskStatus[LaneReader]) -> None:
            async with open_lane(log, histories, shard=shard, lane=lane) as reader:
                task_status.started(reader)
                await reader.run()

        own = await tasks.start(read)
        return cls(log, histories, own, lane=(shard, lane), tasks=tasks)

    async def of(self, shard: int, lane: str) -> LaneReader:
        """Return the reader of a lane, opened if need be. Raises LogError, also if another opening fails
        meanwhile: a silent log would otherwise answer clients one by one."""
        if (reader := self._readers.get((shard, lane))) is not None:
            return reader
        failures = self._failures
        async with self._opening:
            if (shard, lane) not in self._readers:
                if self._failures > failures:
                    raise LogError("the opening of a lane failed meanwhile")
                try:
                    await self._tasks.start(self._read_while_used, shard, lane)
                except LogError:
                    self._failures += 1
                    raise
            return self._readers[shard, lane]

    def every(self) -> list[LaneReader]:
        return list(self._readers.values())

    def bounds(self) -> list[Bound]:
        """Return the bound of each lane, as it is used by the lane with the most bytes."""
        used = max(reader.buffered.total for reader in self.every())
        return [Bound("buffered_bytes", BUFFERED_BYTES_MAX, used)]

    def break_off_all(self, problem: Problem) -> None:
        """End the streams of all clients."""
        for reader in self.every():
            reader.break_off_all(problem)

    def nudge(self, models: Collection[str]) -> None:
        """Wake the clients that wait for one of these models."""
        for reader in self.every():
            reader.nudge(models)

    async def _read_while_used(self, shard: int, lane: str, *, task_status: TaskStatus[LaneReader]) -> None:
        async with open_lane(self._log, self._histories, shard=shard, lane=lane) as reader:
            self._readers[shard, lane] = reader
            task_status.started(reader)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(reader.run)
                was_idle = False
                while not (was_idle and reader.is_idle):
                    was_idle = reader.is_idle
                    await anyio.sleep(IDLE_S)
                del self._readers[shard, lane]
                tasks.cancel_scope.cancel()


@asynccontextmanager
async def open_lane(
    log: Log, histories: HistoryReader, *, shard: int, lane: str
) -> AsyncIterator[LaneReader]:
    """Open a reader of all records that are appended to a lane after this call. Raises LogError."""
    stream = subjects.shard_stream(shard)
    after = await log.last_sequence(stream)
    async with log.follow(stream, subjects.answers(shard, lane), after=after) as follower:
        yield LaneReader(follower, histories)
