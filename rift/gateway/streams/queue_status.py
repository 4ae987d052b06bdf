"""What a client is told while its request waits, and how often.

    queued      a replica of the model is ready, and every slot of it is taken
    starting    none is ready; with an estimate, once there is a start to learn from

Pure, but for `Waiting`, which wakes the streams whose status has changed.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from events.contracts import SECOND_NS
from events.fleet import Fleet
from rift.gateway.streams.lane_reader import LaneReader

# Proxies close what is silent for 30 s or more.
KEEP_ALIVE_S = 12.0

# An estimate counts down: a screen that shows it every other second is alive, and a crowd costs little.
STATUS_S = 2.0


class Status(msgspec.Struct, frozen=True):
    """`estimate_ms` is how long it takes until a replica is ready, in whole seconds; None: not known."""

    name: Literal["queued", "starting"]
    estimate_ms: int | None = None


def status(fleet: Fleet, model: str, now_ns: int) -> Status:
    """Return what a request for the model waits for. `now_ns` is the broker's time."""
    if fleet.is_ready(model):
        return Status("queued")
    start_ns = fleet.start_ns(model)
    if start_ns is None and (decided := fleet.decided.get(model)) is not None:
        start_ns = decided.inputs.get("replicas.start_ns")
    if start_ns is None:
        return Status("starting")
    replicas = fleet.replicas.get(model, {}).values()
    began_ns = min((one.began_at_ns for one in replicas if one.state == "starting"), default=now_ns)
    left_ns = max(0, start_ns - max(0, now_ns - began_ns))
    return Status("starting", -(-left_ns // SECOND_NS) * 1000)


class StatusNotices:
    """What one client was told last: it hears of another status at once, of another estimate soon."""

    def __init__(self) -> None:
        self._told: Status | None = None
        self._at = 0.0

    def due(self, now: Status, at: float) -> bool:
        """Say whether the client should be told now; then it is taken as told."""
        told = self._told
        if told is not None and told.name == now.name:
            after_s = KEEP_ALIVE_S if told == now else STATUS_S
            if at < self._at + after_s:
                return False
        self._told = now
        self._at = at
        return True


class QueueStatus:
    """The fleet as who waits sees it."""

    def __init__(
        self, fleet: Fleet, relays: Callable[[], Iterable[LaneReader]], now_ns: Callable[[], int]
    ) -> None:
        self._fleet = fleet
        self._relays = relays
        self._now_ns = now_ns
        self._ready: frozenset[str] = frozenset()

    def status(self, model: str) -> Status:
        return status(self._fleet, model, max(self._now_ns(), self._fleet.at_ns))

    def changed(self) -> None:
        """The fleet has changed: wake who waits for a model that became ready, or is not ready any more."""
        ready = frozenset(model for model in self._fleet.replicas if self._fleet.is_ready(model))
        models = self._ready ^ ready
        self._ready = ready
        if models:
            for relay in self._relays():
                relay.nudge(models)
