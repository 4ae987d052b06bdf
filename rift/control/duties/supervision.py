"""What the janitor knows, and what it finds due: every accepted request ends. Pure; time comes in.

    a live attempt's replica is lost           release the attempt, return its delivery
    a live attempt has not moved for a bound   the same: it is stalled
    nobody works on a request for a bound      offer it again: the same acceptance, a new delivery
    the key that asked for it is revoked       want its cancel
    a cancel is wanted for 10 s                end it
    its model does not start                   end it
    its deadline has passed                    end it
    its lane is lost, and nobody attached      end it

What the janitor says counts only if the fold agrees, so a late or repeated word harms nobody.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from events import subjects
from events.contracts import SECOND_NS
from events.fleet import Fleet
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
    ReplicaLost,
    ReplicaStarting,
    RequestAccepted,
    RequestFinished,
)

# A worker notices its own engine's hang after 30 s; this is for workers that notice nothing.
STALLED_NS = 60 * SECOND_NS
STALLED_PER_PROMPT_TOKEN_NS = SECOND_NS // 50

# A returned delivery is taken within milliseconds; a queue may be long. Each offer doubles the wait.
UNTAKEN_NS = 10 * SECOND_NS
QUEUED_NS = 300 * SECOND_NS

# The worker expires and cancels by itself. Past these nobody works on the request.
EXPIRED_NS = 5 * SECOND_NS
CANCELLED_NS = 10 * SECOND_NS

# Three reports of a lane; and how long its clients may take to come back elsewhere.
LANE_NS = 10 * SECOND_NS
GRACE_NS = 15 * SECOND_NS

# A start that fails once is tried again for who waits; a third in a row is no accident.
FAILED_STARTS_MAX = 3

# What was found due is not found again while the log is read back.
AGAIN_NS = 2 * SECOND_NS


class Release(msgspec.Struct, frozen=True):
    """Release an attempt on behalf of who cannot, and return its delivery."""

    at: subjects.Address
    event: AttemptReleased
    delivery: str


class Offer(msgspec.Struct, frozen=True):
    """Append the acceptance again that stands at `sequence`."""

    at: subjects.Address
    sequence: int


class End(msgspec.Struct, frozen=True):
    at: subjects.Address
    event: RequestFinished


class Revoke(msgspec.Struct, frozen=True):
    at: subjects.Address
    event: CancelRequested


Due = Release | Offer | End | Revoke | LaneLost


class Watched(msgspec.Struct):
    """An open request. Times are the broker's."""

    at: subjects.Address
    model: str
    key: str
    sequence: int
    deadline_ns: int
    detached: bool
    moved_ns: int
    life: Life
    worker: str = ""
    delivery: str = ""
    started_ns: int = 0
    attached_ns: int = 0
    wanted_ns: int = 0
    acted_ns: int = 0
    offers: int = 0


class Loss(msgspec.Struct):
    """A replica was lost. What runs under its name again, say a container that its pod restarted, is another:
    it began at `again_ns`, and attempts before that are lost."""

    cause: str
    again_ns: float = math.inf


class Supervision:
    def __init__(self) -> None:
        # Since when the janitor acts: clients of a lane that was lost before may come back until then.
        self.began_ns = 0
        self._lives = RequestStates()
        self._open: dict[str, Watched] = {}
        # Until their deadline: a late repeat of an acceptance opens nothing.
        self._ended: dict[str, int] = {}
        self._lanes: dict[str, int] = {}
        self._lost_lanes: dict[str, int] = {}
        self._fleet = Fleet()
        self._losses: dict[str, Loss] = {}
        self._revoked: set[str] = set()

    def __len__(self) -> int:
        return len(self._open)

    def see_fleet(self, stored: Stored) -> None:
        """Take a record of the fleet's stream."""
        for event in self._fleet.fold(stored):
            if isinstance(event, ReplicaLost):
                self._losses[event.replica] = Loss(event.cause)
            elif isinstance(event, ReplicaStarting) and event.replica in self._losses:
                self._losses[event.replica].again_ns = stored.stored_at_ns

    def see_book(self, event: Any) -> None:
        if isinstance(event, KeyRevoked):
            self._revoked.add(event.key)

    @property
    def lanes(self) -> Mapping[str, int]:
        """When each lane that is not lost was heard last."""
        return self._lanes

    def see_lane(self, event: Any, stored_at_ns: int) -> None:
        match event:
            case LaneOpened() | LaneReported():
                self._lanes[event.lane] = stored_at_ns
                self._lost_lanes.pop(event.lane, None)
            case LaneLost():
                self._lanes.pop(event.lane, None)
                self._lost_lanes.setdefault(event.lane, stored_at_ns)
            case ClientAttached() if event.request in self._open:
                self._open[event.request].attached_ns = stored_at_ns

    def see(self, event: Any, at: subjects.Address, sequence: int, stored_at_ns: int) -> None:
        """Take an event of a request, in log order."""
        if isinstance(event, RequestAccepted) and self._is_new(event.request):
            self._accept(event, at, sequence, stored_at_ns)
        counted = self._lives.fold(event, at)
        if counted is None:
            return
        request, life = counted
        if life.phase == "ended":
            self._ended[request] = self._open.pop(request).deadline_ns
            self._lives.forget(request)
            return
        watched = self._open[request]
        watched.life = life
        watched.moved_ns = stored_at_ns
        watched.offers = 0
        if isinstance(event, AttemptStarted):
            watched.worker = event.worker
            watched.delivery = event.delivery
            watched.started_ns = stored_at_ns
        if life.wanted is not None and not watched.wanted_ns:
            watched.wanted_ns = stored_at_ns

    def _is_new(self, request: str) -> bool:
        return request not in self._open and request not in self._ended

    def _accept(self, event: RequestAccepted, at: subjects.Address, sequence: int, stored_at_ns: int) -> None:
        self._lives.follow(event.request)
        self._open[event.request] = Watched(
            at=at,
            model=event.model,
            key=event.key,
            sequence=sequence,
            deadline_ns=stored_at_ns + event.deadline_ms * SECOND_NS // 1000,
            detached=event.detached,
            moved_ns=stored_at_ns,
            life=self._lives[event.request],
        )
        if at.lane not in self._lost_lanes:
            self._lanes.setdefault(at.lane, stored_at_ns)

    def due(self, now_ns: int) -> list[Due]:
        """Return what has to be said at `now_ns`; once each, until the log had time to answer."""
        found: list[Due] = [
            LaneLost(lane=lane) for lane, seen_ns in self._lanes.items() if now_ns - seen_ns > LANE_NS
        ]
        for lost in found:
            assert isinstance(lost, LaneLost)
            self._lanes.pop(lost.lane)
        self._forget_ended(now_ns)
        for request, watched in self._open.items():
            if now_ns - watched.acted_ns > AGAIN_NS and (action := self._due(request, watched, now_ns)):
                watched.acted_ns = now_ns
                found.append(action)
        return found

    def _forget_ended(self, now_ns: int) -> None:
        while self._ended and self._ended[oldest := next(iter(self._ended))] < now_ns:
            del self._ended[oldest]

    def _due(self, request: str, watched: Watched, now_ns: int) -> Due | None:
        life = watched.life
        if now_ns > watched.deadline_ns + EXPIRED_NS:
            return _end(request, watched, "expired", "the deadline passed before the answer was whole")
        if life.wanted is None and watched.key in self._revoked:
            return Revoke(watched.at, CancelRequested(request=request, why="revoked"))
        if life.wanted is not None and now_ns - watched.wanted_ns > CANCELLED_NS:
            return _end(request, watched, cancelled_as(life.wanted), "cancelled while no worker answered")
        if self._is_abandoned(watched, now_ns):
            return _end(request, watched, "cancelled", "its gateway was lost and no client came back")
        if not life.live and (why_not := self._why_unavailable(watched)):
            return _end(request, watched, "failed", why_not, code="model_unavailable")
        if life.live:
            why = self._why_release(watched, now_ns)
            return _release(watched, why) if why else None
        waited_ns = UNTAKEN_NS if life.attempt else QUEUED_NS
        if now_ns - watched.moved_ns > waited_ns << min(watched.offers, 6):
            watched.offers += 1
            return Offer(watched.at, watched.sequence)
        return None

    def _is_abandoned(self, watched: Watched, now_ns: int) -> bool:
        lost_ns = self._lost_lanes.get(watched.at.lane)
        if watched.detached or lost_ns is None:
            return False
        return now_ns - max(lost_ns, watched.attached_ns, self.began_ns) > GRACE_NS

    def _why_unavailable(self, watched: Watched) -> str | None:
        """Say why no replica will take a request that waits: starts failed in a row, the last after it came,
        and no other replica serves."""
        starts = self._fleet.starts.get(watched.model)
        if starts is None or starts.failed < FAILED_STARTS_MAX or starts.failed_at_ns < watched.moved_ns:
            return None
        if self._fleet.is_ready(watched.model) or self._fleet.count(watched.model, "starting"):
            return None
        return f"{watched.model} does not start: {starts.failed} starts failed, the last one: {starts.why}"

    def _why_release(self, watched: Watched, now_ns: int) -> ReleaseReason | None:
        loss = self._losses.get(watched.worker)
        if loss is not None and watched.started_ns < loss.again_ns:
            return "host" if loss.cause == "host" else "lost"
        beside = (other for other in self._open.values() if other.worker == watched.worker)
        tokens = sum(other.life.prompt_tokens for other in beside)
        bound_ns = STALLED_NS + tokens * STALLED_PER_PROMPT_TOKEN_NS
        return "stalled" if now_ns - watched.moved_ns > bound_ns else None


def _end(
    request: str, watched: Watched, reason: FinishReason, message: str, *, code: str | None = None
) -> End:
    event = RequestFinished(
        request=request,
        attempt=None,
        reason=reason,
        output_tokens=watched.life.next_index,
        error=Problem(code=code or reason, message=message),
    )
    return End(watched.at, event)


def _release(watched: Watched, why: ReleaseReason) -> Release:
    assert watched.life.attempt is not None, "a live request has an attempt"
    return Release(watched.at, AttemptReleased(attempt=watched.life.attempt, why=why), watched.delivery)
