"""The rules by which every accepted request ends. Pure: events and times are arguments.

| state of a request; the first that applies         | action                                     |
|----------------------------------------------------|--------------------------------------------|
| its deadline has passed                            | end it                                     |
| its key is revoked                                 | request its cancellation                   |
| its cancellation was requested 10 s ago            | end it                                     |
| its lane is lost, and no client came back in time  | end it                                     |
| it waits, and its model does not start             | end it                                     |
| its attempt's replica is lost                      | release the attempt, return its delivery   |
| its attempt makes no progress for too long         | the same: it is stalled                    |
| it waits without an attempt for too long           | append the acceptance again: a redelivery  |

Every action counts only if the requests' fold agrees, so a late or repeated one is harmless.

`agenda.py` chooses the requests to which the rules are applied: those for which the result may have changed.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import msgspec

from events import subjects
from events.contracts import (
    CLIENT_GRACE_S,
    EXPIRED_S,
    LANE_LOST_S,
    SECOND_NS,
)
from events.fleet import Fleet
from events.ids import parse_request_id
from events.lifecycle import Life, cancelled_as
from events.log import Stored
from events.request_states import RequestStates
from events.schema import (
    AttemptReleased,
    AttemptStarted,
    CancelRequested,
    ClientAttached,
    FinishReason,
    KeyRevoked,
    LaneLost,
    LaneOpened,
    LaneReported,
    Problem,
    ReleaseReason,
    ReplicaDraining,
    ReplicaLost,
    ReplicaStarting,
    ReplicaStopped,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)
from rift.control.duties.agenda import NEVER_NS, Agenda, WorkerLoads, ns

# How long a request may wait for a worker before its acceptance is appended again: after a released attempt,
# whose delivery a worker normally takes within milliseconds, and in the queue, which may be long. Each
# redelivery doubles the wait.
REDELIVER_RELEASED_S = 10.0
REDELIVER_QUEUED_S = 300.0
DOUBLINGS_MAX = 6

# A worker carries out a cancellation itself. After this time we assume that none works on the request.
CANCEL_S = 10.0

# A failed start is retried for the requests that wait; three failures in a row are not an accident.
FAILED_STARTS_MAX = 3

# An action is repeated if its event has not come back from the log after this time.
REPEAT_NS = ns(2.0)


class AttemptRelease(msgspec.Struct, frozen=True):
    """Release an attempt for a worker that cannot, and return its delivery."""

    at: subjects.Address
    event: AttemptReleased
    delivery: str


class Redelivery(msgspec.Struct, frozen=True):
    """Append the acceptance at `sequence` again."""

    at: subjects.Address
    sequence: int


# An event is to be appended as it is.
Action = AttemptRelease | Redelivery | RequestFinished | CancelRequested | LaneLost


class OpenRequest(msgspec.Struct):
    """An accepted request that has not ended. Times are the broker's; 0: not yet."""

    at: subjects.Address
    model: str
    key: str
    sequence: int
    deadline_ns: int
    detached: bool
    progress_at_ns: int
    life: Life
    worker: str = ""
    delivery: str = ""
    started_at_ns: int = 0
    attached_at_ns: int = 0
    cancel_at_ns: int = 0
    acted_at_ns: int = 0
    redeliveries: int = 0


class LiveLane(msgspec.Struct, frozen=True):
    """When a lane last reported, and the address of its gateway's metrics, "" if it is unknown."""

    reported_at_ns: int
    metrics: str = ""


class LostReplica(msgspec.Struct):
    """A replica that was reported lost. Attempts that it started before `restarted_at_ns` are lost; later
    ones belong to a container that was restarted under the same name."""

    cause: str
    restarted_at_ns: float = math.inf


class ReplicaLosses:
    """A fold of the fleet's stream that remembers lost replicas. It calls `fewer` when a model has fewer
    replicas that serve it."""

    def __init__(self, fewer: Callable[[], None]) -> None:
        self.fleet = Fleet()
        self._fewer = fewer
        self._lost: dict[str, LostReplica] = {}

    @property
    def position(self) -> int:
        return self.fleet.position

    def fold(self, stored: Stored) -> None:
        for event in self.fleet.fold(stored):
            if isinstance(event, ReplicaLost):
                self._lost[event.replica] = LostReplica(event.cause)
            elif isinstance(event, ReplicaStarting) and event.replica in self._lost:
                self._lost[event.replica].restarted_at_ns = stored.stored_at_ns
            if isinstance(event, ReplicaLost | ReplicaStopped | ReplicaDraining):
                self._fewer()

    def release_reason(self, replica: str, started_at_ns: int) -> Literal["host", "lost"] | None:
        """Return why an attempt that started then on this replica is lost, or None if it is not."""
        lost = self._lost.get(replica)
        if lost is None or started_at_ns >= lost.restarted_at_ns:
            return None
        return "host" if lost.cause == "host" else "lost"


class Supervision:
    """The open requests of one shard, and the actions that are due on them.

    It is fed with the shard (`fold_request`, `fold_lane`), the book (`fold_book`) and, through `replicas`,
    the fleet. The times of the shard's events never decrease.
    """

    def __init__(self) -> None:
        self._agenda = Agenda()
        self._loads = WorkerLoads()
        self.replicas = ReplicaLosses(self._agenda.touch_all)
        # When the janitor began to act: clients of a lane that was lost earlier have their grace from then.
        self._began_at_ns = 0
        # When the log last stored nothing: every silence counts from then.
        self._outage_at_ns = 0
        self._lives = RequestStates()
        self._open: dict[str, OpenRequest] = {}
        # Kept until the deadline: a late repeat of an acceptance must not open the request again.
        self._ended: dict[str, int] = {}
        # When each lane last reported, was declared lost by us, and was lost on the log.
        self._lanes: dict[str, LiveLane] = {}
        self._declared_at_ns: dict[str, int] = {}
        self._lost_lanes: dict[str, int] = {}
        self._revoked: set[str] = set()

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, now_ns: int) -> None:
        """Note that actions are carried out from this time on."""
        self._began_at_ns = now_ns

    def note_outage(self, now_ns: int) -> None:
        """Note that the log stores nothing now, so that silent processes need not be lost."""
        self._outage_at_ns = now_ns

    def fold_book(self, event: Any) -> None:
        if isinstance(event, KeyRevoked):
            self._revoked.add(event.key)
            self._agenda.touch_all()

    @property
    def lanes(self) -> Mapping[str, LiveLane]:
        """The live lanes."""
        return self._lanes

    def fold_lane(self, event: Any, stored_at_ns: int) -> None:
        match event:
            case LaneOpened() | LaneReported():
                self._lanes[event.lane] = LiveLane(stored_at_ns, event.metrics)
                self._lost_lanes.pop(event.lane, None)
            case LaneLost():
                self._lanes.pop(event.lane, None)
                self._declared_at_ns.pop(event.lane, None)
                self._lost_lanes.setdefault(event.lane, stored_at_ns)
                self._agenda.touch_all()
            case ClientAttached() if event.request in self._open:
                self._open[event.request].attached_at_ns = stored_at_ns

    def fold_request(self, event: Any, at: subjects.Address, sequence: int, stored_at_ns: int) -> None:
        """Apply an event of a request, in log order."""
        if isinstance(event, RequestAccepted) and self._is_new(event.request, at):
            self._accept(event, at, sequence, stored_at_ns)
        counted = self._lives.fold(event, at)
        if counted is None:
            return
        request, life = counted
        opened = self._open[request]
        if life.phase == "ended":
            self._note_end(request, opened)
            return
        if isinstance(event, AttemptStarted):
            self._note_start(request, opened, event, life)
            opened.started_at_ns = stored_at_ns
        opened.life = life
        opened.progress_at_ns = stored_at_ns
        opened.redeliveries = 0
        if life.live:
            self._loads.progressed(opened.worker, request, stored_at_ns)
        elif opened.worker:
            self._loads.stopped(opened.worker, request)
        if life.wanted is not None and not opened.cancel_at_ns:
            opened.cancel_at_ns = stored_at_ns
        if not isinstance(event, TokensGenerated):
            self._agenda.touch(request)

    def _note_start(self, request: str, opened: OpenRequest, event: AttemptStarted, life: Life) -> None:
        if opened.worker:
            self._loads.remove(opened.worker, request, opened.life.prompt_tokens)
        self._loads.add(event.worker, life.prompt_tokens)
        opened.worker = event.worker
        opened.delivery = event.delivery

    def _note_end(self, request: str, opened: OpenRequest) -> None:
        if opened.worker:
            self._loads.remove(opened.worker, request, opened.life.prompt_tokens)
        self._agenda.remove(request)
        del self._open[request]
        self._ended[request] = opened.deadline_ns
        self._lives.forget(request)

    def _is_new(self, request: str, at: subjects.Address) -> bool:
        """Return whether to supervise a request. One accepted on another subject than its id's is none."""
        if request in self._open or request in self._ended:
            return False
        parsed = parse_request_id(request)
        return parsed is not None and parsed.at == at

    def _accept(self, event: RequestAccepted, at: subjects.Address, sequence: int, stored_at_ns: int) -> None:
        self._lives.follow(event.request)
        self._open[event.request] = OpenRequest(
            at=at,
            model=event.model,
            key=event.key,
            sequence=sequence,
            deadline_ns=stored_at_ns + event.deadline_ms * SECOND_NS // 1000,
            detached=event.detached,
            progress_at_ns=stored_at_ns,
            life=self._lives[event.request],
        )
        if at.lane not in self._lost_lanes:
            self._lanes.setdefault(at.lane, LiveLane(stored_at_ns))

    def due(self, now_ns: int) -> list[Action]:
        """Return the actions that are due. Each is returned once until the log has had time to answer."""
        silent = [
            lane
            for lane, live in self._lanes.items()
            if now_ns - max(live.reported_at_ns, self._outage_at_ns) > ns(LANE_LOST_S)
            and now_ns - self._declared_at_ns.get(lane, 0) > REPEAT_NS
        ]
        self._declared_at_ns.update(dict.fromkeys(silent, now_ns))
        actions: list[Action] = [LaneLost(lane=lane) for lane in silent]
        self._forget_ended(now_ns)
        for request in self._candidates(now_ns):
            opened = self._open[request]
            if now_ns <= opened.acted_at_ns + REPEAT_NS:
                self._agenda.plan(request, opened.acted_at_ns + REPEAT_NS)
            elif action := self._action(request, opened, now_ns):
                opened.acted_at_ns = now_ns
                actions.append(action)
                self._agenda.plan(request, now_ns + REPEAT_NS)
            else:
                self._agenda.plan(request, min(self._times_ns(opened)))
        return actions

    def _candidates(self, now_ns: int) -> Collection[str]:
        """Return the requests on which an action may be due."""

        def is_silent(progress_ns: int, bound_ns: int) -> bool:
            return now_ns - max(progress_ns, self._outage_at_ns) > bound_ns

        return [*self._agenda.due(now_ns, self._open), *self._loads.silent(is_silent)]

    def _forget_ended(self, now_ns: int) -> None:
        while self._ended and self._ended[oldest := next(iter(self._ended))] < now_ns:
            del self._ended[oldest]

    def _action(self, request: str, opened: OpenRequest, now_ns: int) -> Action | None:
        life = opened.life
        expires_ns, cancelled_ns, abandoned_ns, redelivery_ns = self._times_ns(opened)
        if now_ns > expires_ns:
            return _end(request, life, "expired", "the deadline passed before the answer was complete")
        if life.wanted is None and opened.key in self._revoked:
            return CancelRequested(request=request, why="revoked")
        if life.wanted is not None and now_ns > cancelled_ns:
            return _end(request, life, cancelled_as(life.wanted), "cancelled while no worker answered")
        if now_ns > abandoned_ns:
            return _end(request, life, "cancelled", "its gateway was lost and no client came back")
        if not life.live and (why := self._why_unavailable(opened)):
            return _end(request, life, "failed", why, code="model_unavailable")
        if life.live:
            reason = self._release_reason(opened, now_ns)
            return _release(opened, reason) if reason else None
        if now_ns > redelivery_ns:
            opened.redeliveries += 1
            return Redelivery(opened.at, opened.sequence)
        return None

    def _times_ns(self, opened: OpenRequest) -> tuple[int, int, int, int]:
        """Return after which times the request expires, its cancellation is carried out, it is abandoned,
        and it is redelivered. Only an event can bring one of them forward."""
        life = opened.life
        lost_at_ns = None if opened.detached else self._lost_lanes.get(opened.at.lane)
        since_ns = max(lost_at_ns or 0, opened.attached_at_ns, self._began_at_ns, self._outage_at_ns)
        wait_s = REDELIVER_RELEASED_S if life.attempt else REDELIVER_QUEUED_S
        wait_s *= 1 << min(opened.redeliveries, DOUBLINGS_MAX)
        return (
            opened.deadline_ns + ns(EXPIRED_S),
            NEVER_NS if life.wanted is None else opened.cancel_at_ns + ns(CANCEL_S),
            NEVER_NS if lost_at_ns is None else since_ns + ns(CLIENT_GRACE_S),
            NEVER_NS if life.live else opened.progress_at_ns + ns(wait_s),
        )

    def _why_unavailable(self, opened: OpenRequest) -> str | None:
        """Return why no replica will take a waiting request: starts failed in a row, the last one after the
        request arrived, and no other replica serves or starts. None if one may."""
        fleet = self.replicas.fleet
        starts = fleet.starts.get(opened.model)
        if starts is None or starts.failed < FAILED_STARTS_MAX or starts.failed_at_ns < opened.progress_at_ns:
            return None
        if fleet.is_ready(opened.model) or fleet.count(opened.model, "starting"):
            return None
        return (
            f"{opened.model} does not start: {starts.failed} starts failed in a row; the operator's "
            "`rift status` shows why"
        )

    def _release_reason(self, opened: OpenRequest, now_ns: int) -> ReleaseReason | None:
        if (reason := self.replicas.release_reason(opened.worker, opened.started_at_ns)) is not None:
            return reason
        silent_ns = now_ns - max(opened.progress_at_ns, self._outage_at_ns)
        return "stalled" if silent_ns > self._loads.bound_ns(opened.worker) else None


def _end(
    request: str, life: Life, reason: FinishReason, message: str, *, code: str | None = None
) -> RequestFinished:
    return RequestFinished(
        request=request,
        attempt=None,
        reason=reason,
        output_tokens=life.next_index,
        error=Problem(code=code or reason, message=message),
    )


def _release(opened: OpenRequest, why: ReleaseReason) -> AttemptRelease:
    assert opened.life.attempt is not None, "a live request has an attempt"
    return AttemptRelease(opened.at, AttemptReleased(attempt=opened.life.attempt, why=why), opened.delivery)
