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

    def fold(self, stored: Stored) -> None:
        for event in codec.decode(stored.data)[1]:
            match event:
                case ReplicaStarting():
                    self.replicas.setdefault(event.model, {})[event.replica] = "starting"
                case ReplicaReady():
                    self.replicas.setdefault(event.model, {})[event.replica] = "ready"
                case ReplicaDraining():
                    self.replicas.setdefault(event.model, {})[event.replica] = "draining"
                case ReplicaStopped() | ReplicaLost():
                    self.replicas.get(event.model, {}).pop(event.replica, None)
                case ScaleDecided():
                    self.wanted[event.model] = event.to_replicas
        self.position = stored.sequence

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
