"""The relays of one gateway: its own lane's for life, other lanes' while somebody resumes there."""

from functools import partial

import anyio
from anyio.abc import TaskGroup

from events.log import Log, LogError
from events.request_history import HistoryReader
from rift.gateway.streams.lane_reader import LaneReader

# A lane that nobody waits for any more is followed this long: the next to resume often comes soon.
IDLE_S = 30.0


class LaneRegistry:
    def __init__(
        self, log: Log, histories: HistoryReader, *, shard: int, lane: str, tasks: TaskGroup
    ) -> None:
        self._log = log
        self._histories = histories
        self._tasks = tasks
        self.own = LaneReader(log, histories, shard=shard, lane=lane)
        self._relays = {(shard, lane): self.own}
        self._opening = anyio.Lock()

    async def open(self) -> None:
        """Start to read the gateway's own lane; return once the reader is confirmed. Raises LogError."""
        await self._open(self.own, idle_s=None)

    async def of(self, shard: int, lane: str) -> LaneReader:
        """Return the lane's relay, which reads by then. Raises LogError."""
        if (relay := self._relays.get((shard, lane))) is not None:
            return relay
        async with self._opening:
            if (relay := self._relays.get((shard, lane))) is None:
                relay = LaneReader(self._log, self._histories, shard=shard, lane=lane)
                await self._open(relay, idle_s=IDLE_S)
                self._relays[shard, lane] = relay
            return relay

    def every(self) -> list[LaneReader]:
        return list(self._relays.values())

    async def _open(self, relay: LaneReader, *, idle_s: float | None) -> None:
        settled = anyio.Event()
        failed: list[LogError] = []

        async def read() -> None:
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(partial(relay.run, opened=settled.set))
                    if idle_s is not None:
                        await self._until_idle(relay, idle_s)
                        tasks.cancel_scope.cancel()
            except* LogError as group:
                if settled.is_set():
                    raise
                failed.append(LogError(f"the lane cannot be read: {group.exceptions[0]}"))
                settled.set()

        self._tasks.start_soon(read)
        await settled.wait()
        if failed:
            raise failed[0]

    async def _until_idle(self, relay: LaneReader, idle_s: float) -> None:
        was_idle = False
        while not (was_idle and relay.is_idle):
            was_idle = relay.is_idle
            await anyio.sleep(idle_s)
        self._relays = {key: other for key, other in self._relays.items() if other is not relay}
