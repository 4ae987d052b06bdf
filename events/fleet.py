"""The leader, the last scaling decision of each model, and the state of its replicas, folded from RIFT_FLEET.

    ControlElected   counts if its epoch is higher than the last; its writer has read the last and adds one
    ScaleDecided     counts if its epoch is the last, `from_replicas` is the last decision, and its writer had
                     read that decision (`positions` is how far it had read)
    ScalePlanned     counts if its epoch is the last
    ReplicaStarting  begins a replica; reports of a replica that has ended or never began are ignored

So one of two candidates leads, and a late or repeated decision changes nothing: the order of the stream is
the fence. A reader that begins after a trim takes the first election, and the first decision of each model,
that it meets. It arrives at the same state, because a trim keeps the last decisions and their elections.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from events import codec, stream_fold
from events.contracts import SECOND_NS
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
    ScalePlanned,
)
from events.subjects import FLEET

logger = logging.getLogger(__name__)

# A key among the model names in `_needed`; no model has this name.
ELECTION = ""

# The next start is expected to take the median of this many starts, so that one odd start does not matter.
STARTS = 5

# Replicas that are lost within this time of each other count as one series.
LOSSES_NS = 600 * SECOND_NS

# With less work than this, an engine might idle while its replica asks for the next request and encodes it.
FILL_MS_MIN = 250

# The floor looks at the plans of five minutes, which are at least 30 s apart.
PLANS = 12


class Replica(msgspec.Struct):
    """A live replica. Times are stored times: `began_at_ns` is that of the decision which it follows
    (`is_ordered`), or else of its first report; `heard_at_ns` is its last report's, `at` its first sequence.
    `slots` is the number of requests that it can run at once, 0 before it is ready; it takes them from the
    first `shards` shards. `metrics` is the address of its metrics, empty if it has none."""

    state: Literal["starting", "ready", "draining"]
    began_at_ns: int
    heard_at_ns: int
    at: int
    slots: int = 0
    shards: int = 1
    metrics: str = ""
    is_ordered: bool = False


class Starts(msgspec.Struct):
    """A model's starts: `took_ns` of the last successful ones, and how many have failed since.

    A start lasts from its decision until ready; that of a replica that replaces a lost one, from its first
    report."""

    took_ns: tuple[int, ...] = ()
    failed: int = 0
    failed_at_ns: int = 0
    why: str = ""


class Losses(msgspec.Struct, frozen=True):
    """A model's lost replicas: how many, each within LOSSES_NS of the one before; the time and reason of the
    last. A failed start is none of them."""

    count: int
    at_ns: int
    why: str


class Planned(msgspec.Struct, frozen=True):
    """A model's floor from `at_ns`, its plan's time, until the next plan; `sequence` is the plan's."""

    sequence: int
    at_ns: int
    floor: int
    restart: int
    is_missed: bool
    policy: str


class ReplicaTimelines:
    """The elections and decisions that count: `leader` leads in `epoch`, `wanted` is the last decisions."""

    def __init__(self) -> None:
        self.epoch = 0
        self.leader = ""
        self._wanted: dict[str, int] = {}
        self._decided_at: dict[str, int] = {}

    @property
    def wanted(self) -> Mapping[str, int]:
        return self._wanted

    def elect(self, epoch: int, control: str) -> bool:
        """Apply an election. Return whether it counts."""
        if epoch <= self.epoch:
            return False
        if epoch > self.epoch + 1:
            # This reader missed an election, so it began after a trim. The decisions that it has applied
            # since may not count; those that count follow.
            self._wanted.clear()
            self._decided_at.clear()
        self.epoch = epoch
        self.leader = control
        return True

    def decide(self, event: ScaleDecided, sequence: int) -> bool:
        """Apply the decision at `sequence`. Return whether it counts."""
        last = self._decided_at.get(event.model, 0)
        if event.epoch != self.epoch or event.positions.get(FLEET, last) < last:
            return False
        if event.from_replicas != self._wanted.get(event.model, event.from_replicas):
            return False
        self.take(event.model, event.to_replicas, sequence)
        return True

    def take(self, model: str, replicas: int, sequence: int) -> None:
        """Apply a decision that is known to count."""
        self._wanted[model] = replicas
        self._decided_at[model] = sequence


class Fleet:
    """`replicas` holds the live replicas by model and id; `wanted` the last decided numbers."""

    def __init__(self) -> None:
        self.position = 0
        self.at_ns = 0
        self.replicas: dict[str, dict[str, Replica]] = {}
        self.decided: dict[str, ScaleDecided] = {}
        self.plans: dict[str, tuple[Planned, ...]] = {}
        self.starts: dict[str, Starts] = {}
        self.losses: dict[str, Losses] = {}
        self._course = ReplicaTimelines()
        self._needed: dict[str, int] = {}
        # By model: the times of the decisions for replicas that have not reported yet, one for each.
        self._ordered: dict[str, list[int]] = {}

    @property
    def epoch(self) -> int:
        """The latest epoch; 0 before any election."""
        return self._course.epoch

    @property
    def leader(self) -> str:
        return self._course.leader

    @property
    def wanted(self) -> Mapping[str, int]:
        return self._course.wanted

    def fold(self, stored: Stored) -> Sequence[object]:
        """Return the record's events that count, in order. An unreadable record is skipped here; the
        projector, on which bills and decisions depend, stops at it visibly."""
        self.position = stored.sequence
        try:
            events = codec.decode(stored.data, stored.subject)[1]
        except codec.RecordUnreadable as error:
            logger.error("%s:%d: %s", FLEET, stored.sequence, error)
            return ()
        return [event for event in events if self.apply(event, stored.sequence, stored.stored_at_ns)]

    def apply(self, event: object, sequence: int, stored_at_ns: int) -> bool:
        """Apply an event. Return whether it counts."""
        self.at_ns = max(self.at_ns, stored_at_ns)
        self.position = sequence
        match event:
            case ControlElected():
                return self._elected(event, sequence)
            case ScaleDecided():
                return self._decided(event, sequence)
            case ScalePlanned():
                return self._planned(event, sequence)
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
        live = self.count(event.model, "starting") + self.count(event.model, "ready")
        raised = max(0, event.to_replicas - event.from_replicas)
        ordered = [*self._ordered.get(event.model, ()), *[self.at_ns] * raised]
        self._ordered[event.model] = ordered[: max(0, event.to_replicas - live)]
        return True

    def _planned(self, event: ScalePlanned, sequence: int) -> bool:
        if event.epoch != self.epoch:
            return False
        plan = Planned(
            sequence, event.planned_at_ns, event.floor, event.restart, event.is_missed, event.policy
        )
        self.plans[event.model] = (*self.plans.get(event.model, ()), plan)[-PLANS:]
        return True

    def _began(self, event: ReplicaStarting, sequence: int) -> bool:
        """Begin a replica, unless this report is repeated."""
        replicas = self.replicas.setdefault(event.model, {})
        if event.replica in replicas:
            return False
        # A replica that replaces a lost one follows no decision.
        ordered = self._ordered.get(event.model)
        is_ordered = bool(ordered)
        replicas[event.replica] = Replica(
            "starting",
            began_at_ns=ordered.pop(0) if ordered else self.at_ns,
            heard_at_ns=self.at_ns,
            at=sequence,
            metrics=event.metrics,
            is_ordered=is_ordered,
        )
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
            start_ns = self.at_ns - replica.began_at_ns if replica.is_ordered else event.start_ns
            self.starts[event.model] = Starts(took_ns=(*took, start_ns)[-STARTS:])
        elif isinstance(event, ReplicaDraining):
            replica.state = "draining"
        else:
            replica.shards = event.shards
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
        elif isinstance(event, ReplicaLost):
            before = self.recent_losses(event.model)
            self.losses[event.model] = Losses((before.count if before else 0) + 1, self.at_ns, event.why)
        return True

    def recent_losses(self, model: str) -> Losses | None:
        """Return the model's series of losses, unless the last one is longer ago than LOSSES_NS."""
        losses = self.losses.get(model)
        return losses if losses and self.at_ns - losses.at_ns < LOSSES_NS else None

    @property
    def needed_from(self) -> int:
        """The first sequence that later readers need: the earliest of the last election, the elections of the
        models' last decisions, and the first reports of live replicas."""
        first_reports = (replica.at for replicas in self.replicas.values() for replica in replicas.values())
        return min((*self._needed.values(), *first_reports), default=self.position + 1)

    def count(self, model: str, state: str) -> int:
        """Return how many of a model's replicas are in a state."""
        return sum(replica.state == state for replica in self.replicas.get(model, {}).values())

    def slots(self, model: str) -> int:
        """Return how many requests the model's ready replicas can run at once."""
        return sum(one.slots for one in self.replicas.get(model, {}).values() if one.state == "ready")

    def can_serve(self, model: str) -> bool:
        """Return whether the model has a replica or will get one."""
        return bool(self.replicas.get(model)) or self.wanted.get(model, 0) > 0

    def is_ready(self, model: str) -> bool:
        return self.count(model, "ready") > 0

    def failed_start(self, model: str) -> str:
        """Say how many starts have failed since one succeeded, and why the last did; "" if none has."""
        starts = self.starts.get(model)
        if starts is None or not starts.failed:
            return ""
        return f"{model} cannot start, failed starts: {starts.failed}, the last: {starts.why}"

    def began_at_ns(self, model: str) -> int | None:
        """Return when the earliest start of those under way was decided; None if none is under way."""
        began = [one.began_at_ns for one in self.replicas.get(model, {}).values() if one.state == "starting"]
        return min((*began, *self._ordered.get(model, ())), default=None)

    def start_ns(self, model: str) -> int | None:
        """Return the median time of the model's last starts; None before the first."""
        took = sorted(self.starts.get(model, Starts()).took_ns)
        return took[len(took) // 2] if took else None


def unfilled_max(ttft_ms: int, prefill_tokens_per_s: int) -> int:
    """Return the prompt tokens that a replica fills in half of the TTFT target. While it holds as many that
    are not filled, it asks for no requests.

    An engine fills prompts one after the other, so a request that it takes early is not answered earlier. In
    the queue the request is free for the replica that can fill it first.
    """
    return max(ttft_ms // 2, FILL_MS_MIN) * prefill_tokens_per_s // 1000


def may_ask(unfilled: int, unfilled_max: int, usual: int) -> int:
    """Return for how many requests a replica asks, if a usual prompt has `usual` tokens."""
    return max(0, -(-(unfilled_max - unfilled) // max(1, usual)))


async def read(log: Log) -> Fleet:
    """Return the fleet as it is now. Raises LogError."""
    fleet = Fleet()
    await stream_fold.read(log, FLEET, ["rift.fleet.>"], fleet)
    return fleet
