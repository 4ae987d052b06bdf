"""The gateways that are alive, by the reports of their lanes: a limit is divided among them."""

from events import codec
from events.clock import now_s
from events.contracts import LANE_LOST_S
from events.log import Stored
from events.schema import LaneLost, LaneOpened, LaneReported


class LiveGateways:
    """A fold of the lane events after `position`. A gateway always counts itself."""

    def __init__(self, own_lane: str, position: int) -> None:
        self.position = position
        self._own_lane = own_lane
        self._reported_at_s: dict[str, float] = {}

    def fold(self, stored: Stored) -> None:
        self.position = stored.sequence
        for event in codec.decode(stored.data)[1]:
            match event:
                case LaneOpened() | LaneReported():
                    self._reported_at_s[event.lane] = now_s()
                case LaneLost():
                    self._reported_at_s.pop(event.lane, None)

    def __len__(self) -> int:
        since_s = now_s() - LANE_LOST_S
        self._reported_at_s = {lane: at_s for lane, at_s in self._reported_at_s.items() if at_s > since_s}
        return len(self._reported_at_s.keys() | {self._own_lane})
