"""The gateways that are alive, by the reports of their lanes: a limit is divided among them."""

import logging

import anyio

from events import codec, shards, stream_fold, subjects
from events.clock import now_s
from events.contracts import LANE_LOST_S
from events.log import Log, LogError, Stored
from events.schema import LaneLost, LaneOpened, LaneReported

logger = logging.getLogger(__name__)

# A shard that does not answer, or holds a record that cannot be read, is followed from its end after this
# time. Its gateways report every few seconds, and count as gone if nothing is read of them meanwhile.
RETRY_S = 5.0


class LiveGateways:
    """The gateways of all shards. A gateway always counts itself."""

    def __init__(self, shard: int, lane: str) -> None:
        self._own = shard, lane
        self._reported_at_s: dict[tuple[int, str], float] = {}

    async def follow(self, log: Log) -> None:
        """Follow the reports on every shard, until cancelled. Raises LogError if the book is silent."""
        async with anyio.create_task_group() as tasks:

            def opened(shard: int) -> None:
                tasks.start_soon(self._follow_shard, log, shard)

            opened(0)
            await shards.follow(log, 1, opened)

    def note(self, shard: int, event: object) -> None:
        """Apply an event of a shard's lanes."""
        match event:
            case LaneOpened() | LaneReported():
                self._reported_at_s[shard, event.lane] = now_s()
            case LaneLost():
                self._reported_at_s.pop((shard, event.lane), None)

    def __len__(self) -> int:
        return len(self._alive())

    def on_own_shard(self) -> int:
        """Return how many share this gateway's shard."""
        return sum(shard == self._own[0] for shard, _ in self._alive())

    def _alive(self) -> set[tuple[int, str]]:
        since_s = now_s() - LANE_LOST_S
        self._reported_at_s = {lane: at_s for lane, at_s in self._reported_at_s.items() if at_s > since_s}
        return {*self._reported_at_s, self._own}

    async def _follow_shard(self, log: Log, shard: int) -> None:
        stream = subjects.shard_stream(shard)
        while True:
            try:
                reports = _Reports(self, shard, await log.last_sequence(stream))
                await stream_fold.follow(log, stream, [subjects.lane(shard, "*")], reports)
            except (LogError, codec.RecordUnreadable) as error:
                logger.warning("the gateways of %s are not counted: %s", stream, error)
                await anyio.sleep(RETRY_S)


class _Reports:
    """A fold of one shard's lane events after `position`."""

    def __init__(self, gateways: LiveGateways, shard: int, position: int) -> None:
        self.position = position
        self._gateways = gateways
        self._shard = shard

    def fold(self, stored: Stored) -> None:
        self.position = stored.sequence
        for event in codec.decode(stored.data, stored.subject)[1]:
            self._gateways.note(self._shard, event)
