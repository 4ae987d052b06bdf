"""The fleet as its readers hold it: which models have replicas, or are meant to have some."""

from events import codec
from events.log import Log, Stored
from events.schema import (
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
    ReplicaStarting,
    ReplicaStopped,
    ScaleDecided,
)
from events.subjects import FLEET


class Fleet:
    """`replicas` holds each live replica's state by model and id; `wanted` the number decided last."""

    def __init__(self) -> None:
        self.position = 0
        self.replicas: dict[str, dict[str, str]] = {}
        self.wanted: dict[str, int] = {}
        self._first: dict[tuple[str, str], int] = {}

    def fold(self, stored: Stored) -> None:
        for event in codec.decode(stored.data)[1]:
            match event:
                case ReplicaStarting():
                    self._is(event, "starting", stored)
                case ReplicaReady():
                    self._is(event, "ready", stored)
                case ReplicaDraining():
                    self._is(event, "draining", stored)
                case ReplicaStopped() | ReplicaLost():
                    self.replicas.get(event.model, {}).pop(event.replica, None)
                    self._first.pop((event.model, event.replica), None)
                case ScaleDecided():
                    self.wanted[event.model] = event.to_replicas
                    self._first[event.model, ""] = stored.sequence
        self.position = stored.sequence

    def _is(
        self, event: ReplicaStarting | ReplicaReady | ReplicaDraining, state: str, stored: Stored
    ) -> None:
        self.replicas.setdefault(event.model, {})[event.replica] = state
        self._first.setdefault((event.model, event.replica), stored.sequence)

    @property
    def needed_from(self) -> int:
        """The first sequence that who reads the fleet later cannot do without: the first word of a live
        replica, or a model's last decision."""
        return min(self._first.values(), default=self.position + 1)

    def can_serve(self, model: str) -> bool:
        """Say whether a request for the model will be taken, now or once a replica has started."""
        return bool(self.replicas.get(model)) or self.wanted.get(model, 0) > 0

    def is_ready(self, model: str) -> bool:
        return "ready" in self.replicas.get(model, {}).values()


async def read(log: Log) -> Fleet:
    """Return the fleet as it is now. Raises LogError."""
    fleet = Fleet()
    target = await log.last_sequence(FLEET)
    async for batch in log.scan(FLEET, ["rift.fleet.>"], first=1, target=target):
        for stored in batch:
            fleet.fold(stored)
    return fleet
