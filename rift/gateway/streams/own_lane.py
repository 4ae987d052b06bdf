"""This gateway's lane as the log knows it: opened, reported for as long as the process lives, and lost."""

import anyio

from events.contracts import LANE_REPORT_S
from events.log import Log
from events.publisher import Publisher
from events.schema import LaneLost, LaneOpened, LaneReported
from rift.gateway.state import GatewayConfig

# Long enough to wait out a restart of the broker.
STORED_WITHIN_S = 30.0

# A gateway that stops tries this long to report its lane lost; without that report, its silence has the same
# effect.
LOST_WITHIN_S = 0.5


class OwnLane:
    """`reported_at_s` is when the newest stored report began, on the loop's clock."""

    def __init__(self, publisher: Publisher, id: str, *, reported_at_s: float) -> None:
        self._publisher = publisher
        self.id = id
        self.reported_at_s = reported_at_s

    @classmethod
    async def open(cls, log: Log, config: GatewayConfig) -> "OwnLane":
        """Raises LogError."""
        publisher = Publisher(log, config.lane, shard=config.shard)
        began_at_s = anyio.current_time()
        event = LaneOpened(lane=config.lane, shard=config.shard)
        await publisher.publish(event, within_s=STORED_WITHIN_S)
        return cls(publisher, config.lane, reported_at_s=began_at_s)

    async def report(self) -> None:
        """Report the lane until cancelled. Readers take a lane without reports for lost."""
        while True:
            await anyio.sleep(LANE_REPORT_S)
            began_at_s = anyio.current_time()
            if await self._publisher.try_publish(LaneReported(lane=self.id), within_s=STORED_WITHIN_S):
                self.reported_at_s = began_at_s

    async def close(self) -> None:
        """Report the lane lost, or raise LogError."""
        with anyio.move_on_after(LOST_WITHIN_S):
            await self._publisher.publish(LaneLost(lane=self.id), within_s=STORED_WITHIN_S)
