"""The fleet as its readers hold it: who leads, what was decided for each model, and how its replicas are.

    ControlElected   counts if its epoch is higher than the last; who writes it has read that, and adds one
    ScaleDecided     counts if its epoch is the last, `from_replicas` is what was decided last, and whoever
                     decided had read that (its `positions` say how far)
    ReplicaStarting  begins a replica; what is said of one that has ended, or never began, says nothing

So of two that would lead one does, and a decision that is late or repeated changes nothing: the order of
the stream is the fence. A reader that begins behind a trim takes the first election and the first decision of
each model that it meets, and comes to the same: a trim keeps the last decisions, and their elections.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from events import codec
from events.log import Log, Stored
from events.schema import (
    ControlElected,
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
    ReplicaReported,
    ReplicaStarting,
    ReplicaStopped,
    ScaleDecided,
)
from events.subjects import FLEET

logger = logging.getLogger(__name__)

# Beside the models in what is needed; no model is named so.
ELECTION = ""

# How many of a model's starts say how long the next takes: the middle one of five forgets one odd start.
STARTS = 5


class Replica(msgspec.Struct):
    """One that lives. Times are stored times; `heard_at_ns` is its last word, `at` its first position;
    `slots` is how many requests it runs at once, 0 before it is ready."""

    state: Literal["starting", "ready", "draining"]
    began_at_ns: int
    heard_at_ns: int
    at: int
    slots: int = 0


class Starts(msgspec.Struct):
    """How a model's starts went: `took_ns` of the last that succeeded, and how many failed since."""

    took_ns: tuple[int, ...] = ()
    failed: int = 0
    failed_at_ns: int = 0
    why: str = ""


class ReplicaTimelines:
    """Which elections and decisions count: `leader` leads in `epoch`, `wanted` is what was decided last."""

    def __init__(self) -> None:
        self.epoch = 0
        self.leader = ""
        self._wanted: dict[str, int] = {}
        self._decided_at: dict[str, int] = {}

    @property
    def wanted(self) -> Mapping[str, int]:
        return self._wanted

    def elect(self, epoch: int, control: str) -> bool:
        """Say whether the election counts."""
        if epoch <= self.epoch:
            return False
        if epoch > self.epoch + 1:
            # An election was missed, so this reader began behind a trim. What it took for decisions since
            # may be nobody's; those that count follow.
            self._wanted.clear()
            self._decided_at.clear()
        self.epoch = epoch
        self.leader = control
        return True

    def decide(self, event: ScaleDecided, sequence: int) -> bool:
        """Say whether the decision, which stands at `sequence`, counts."""
        last = self._decided_at.get(event.model, 0)
        if event.epoch != self.epoch or event.positions.get(FLEET, last) < last:
            return False
        if event.from_replicas != self._wanted.get(event.model, event.from_replicas):
            return False
        self.take(event.model, event.to_replicas, sequence)
        return True

    def take(self, model: str, replicas: int, sequence: int) -> None:
        """Take a decision that is known to count."""
        self._wanted[model] = replicas
        self._decided_at[model] = sequence


class Fleet:
    """`replicas` holds each live replica by model and id; `wanted` the number decided last."""

    def __init__(self) -> None:
        self.position = 0
        self.at_ns = 0
        self.replicas: dict[str, dict[str, Replica]] = {}
        self.decided: dict[str, ScaleDecided] = {}
        self.starts: dict[str, Starts] = {}
        self._course = ReplicaTimelines()
        self._needed: dict[str, int] = {}

    @property
    def epoch(self) -> int:
        """The epoch that counted last; 0 before any."""
        return self._course.epoch

    @property
    def leader(self) -> str:
        return self._course.leader

    @property
    def wanted(self) -> Mapping[str, int]:
        return self._course.wanted

    def fold(self, stored: Stored) -> Sequence[object]:
        """Return the record's events that count, in their order. What cannot be read is passed over here: the
        projector, from which bills and decisions follow, stops at it visibly."""
        self.position = stored.sequence
        try:
            events = codec.decode(stored.data)[1]
        except codec.RecordUnreadable as error:
            logger.error("%s:%d: %s", FLEET, stored.sequence, error)
            return ()
        return [event for event in events if self.apply(event, stored.sequence, stored.stored_at_ns)]

    def apply(self, event: object, sequence: int, stored_at_ns: int) -> bool:
        """Say whether the event counts."""
        self.at_ns = max(self.at_ns, stored_at_ns)
        self.position = sequence
        match event:
            case ControlElected():
                return self._elected(event, sequence)
            case ScaleDecided():
                return self._decided(event, sequence)
            case ReplicaStarting():
                return self._began(event, sequence)
            case ReplicaReady() | ReplicaReported() | ReplicaDraining():
                return self._heard(event)
            case ReplicaStopped() | ReplicaLost():
                return self._ended(event)
        return False

    def _elected(self, event: ControlElected, sequence: int) -> bool:
        if not self._course.elect(event.epoch, event.control):
            return False
        for model in self.decided.keys() - self.wanted.keys():
            del self.decided[model], self._needed[model]
        self._needed[ELECTION] = sequence
        return True

    def _decided(self, event: ScaleDecided, sequence: int) -> bool:
        if not self._course.decide(event, sequence):
            return False
        self.decided[event.model] = event
        self._needed[event.model] = self._needed.get(ELECTION, sequence)
        return True

    def _began(self, event: ReplicaStarting, sequence: int) -> bool:
        """A repeated or late word begins nothing again."""
        replicas = self.replicas.setdefault(event.model, {})
        if event.replica in replicas:
            return False
        replicas[event.replica] = Replica("starting", self.at_ns, self.at_ns, sequence)
        return True

    def _heard(self, event: ReplicaReady | ReplicaReported | ReplicaDraining) -> bool:
        replica = self.replicas.get(event.model, {}).get(event.replica)
        if replica is None:
            return False
        replica.heard_at_ns = self.at_ns
        if isinstance(event, ReplicaReady):
            replica.state = "ready"
            replica.slots = event.slots
            took = self.starts.get(event.model, Starts()).took_ns
            self.starts[event.model] = Starts(took_ns=(*took, event.start_ns)[-STARTS:])
        elif isinstance(event, ReplicaDraining):
            replica.state = "draining"
        return True

    def _ended(self, event: ReplicaStopped | ReplicaLost) -> bool:
        replica = self.replicas.get(event.model, {}).pop(event.replica, None)
        if replica is None:
            return False
        if isinstance(event, ReplicaLost) and event.cause == "engine" and replica.state == "starting":
            starts = self.starts.setdefault(event.model, Starts())
            starts.failed = starts.failed + 1
            starts.failed_at_ns = self.at_ns
            starts.why = event.why
        return True

    @property
    def needed_from(self) -> int:
        """The first sequence that who reads the fleet later cannot do without: the last election, that of a
        model's last decision, or the first word of a live replica."""
        living = (replica.at for replicas in self.replicas.values() for replica in replicas.values())
        return min((*self._needed.values(), *living), default=self.position + 1)

    def count(self, model: str, state: str) -> int:
        """Return how many of a model's replicas are in a state."""
        return sum(replica.state == state for replica in self.replicas.get(model, {}).values())

    def slots(self, model: str) -> int:
        """Return how many requests the model's ready replicas run at once."""
        return sum(one.slots for one in self.replicas.get(model, {}).values() if one.state == "ready")

    def can_serve(self, model: str) -> bool:
        """Say whether a request for the model will be taken, now or once a replica has started."""
        return bool(self.replicas.get(model)) or self.wanted.get(model, 0) > 0

    def is_ready(self, model: str) -> bool:
        return self.count(model, "ready") > 0

    def start_ns(self, model: str) -> int | None:
        """Return how long a start of the model takes, by its last ones; None before the first."""
        took = sorted(self.starts.get(model, Starts()).took_ns)
        return took[len(took) // 2] if took else None


async def read(log: Log) -> Fleet:
    """Return the fleet as it is now. Raises LogError."""
    fleet = Fleet()
    target = await log.last_sequence(FLEET)
    async for batch in log.scan(FLEET, ["rift.fleet.>"], first=1, target=target):
        for stored in batch:
            fleet.fold(stored)
    return fleet
