"""This gateway's lane as the log knows it: opened, reported for as long as the process lives, and lost."""

import logging

import anyio

from events import subjects
from events.clock import now_s
from events.contracts import LANE_REPORT_S
from events.log import Log, LogError
from events.publisher import Publisher
from events.schema import LaneLost, LaneOpened, LaneReported
from rift.gateway.state import GatewayConfig

logger = logging.getLogger(__name__)

# Long enough to wait out a restart of the broker.
STORED_WITHIN_S = 30.0
OPEN_RETRY_S = 5.0

# A gateway that stops tries this long to report its lane lost; without that report, its silence has the same
# effect.
LOST_WITHIN_S = 0.5

# How often a lane reports while the log stores nothing, without waiting for the reports under way: the first
# that is stored ends the outage. Each ends after 2 s, so few are under way.
PROBE_S = 0.5


class OwnLane:
    """`reported_at_s` is when the newest stored report began, on the loop's clock."""

    def __init__(self, log: Log, config: GatewayConfig, *, reported_at_s: float) -> None:
        self._log = log
        self._publisher = Publisher(log, config.lane, shard=config.shard)
        self._metrics = str(config.metrics or "")
        self._stream = subjects.shard_stream(config.shard)
        self._subject = subjects.lane(config.shard, config.lane)
        self.id = config.lane
        self.reported_at_s = reported_at_s

    @classmethod
    async def open(cls, log: Log, config: GatewayConfig) -> "OwnLane":
        """Return the lane once the log has stored its opening, however long that takes."""
        publisher = Publisher(log, config.lane, shard=config.shard)
        event = LaneOpened(lane=config.lane, shard=config.shard, metrics=str(config.metrics or ""))
        while True:
            began_at_s = now_s()
            if await publisher.try_publish(event, within_s=STORED_WITHIN_S):
                return cls(log, config, reported_at_s=began_at_s)
            logger.error(
                "this gateway starts once the log stores its first record; the disk of the broker may be "
                "full or read-only"
            )
            await anyio.sleep(OPEN_RETRY_S)

    async def opened_at_ns(self) -> int:
        """Return the stored time of the opening, or of a report since. Raises LogError."""
        last = await self._log.last(self._stream, self._subject)
        return last.stored_at_ns if last is not None else 0

    async def report(self) -> None:
        """Report the lane until cancelled. Readers take a lane without reports for lost."""
        async with anyio.create_task_group() as tasks:
            began_at_s = now_s()
            while True:
                await anyio.sleep(PROBE_S)
                is_due = now_s() - began_at_s > LANE_REPORT_S - PROBE_S / 2
                if is_due or self._log.unwritable_s(self._stream) > PROBE_S:
                    began_at_s = now_s()
                    tasks.start_soon(self._report_once)

    async def _report_once(self) -> None:
        began_at_s = now_s()
        try:
            await self._publisher.publish(LaneReported(lane=self.id, metrics=self._metrics), within_s=0)
        except LogError as error:
            logger.info("this lane's report was not stored: %s", error)
        else:
            self.reported_at_s = max(self.reported_at_s, began_at_s)

    async def close(self) -> None:
        """Report the lane lost, if the log stores that at once."""
        with anyio.move_on_after(LOST_WITHIN_S):
            await self._publisher.try_publish(LaneLost(lane=self.id), within_s=STORED_WITHIN_S)
