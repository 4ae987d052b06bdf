"""The janitor looks at few requests, and misses none: its actions are those of a look at all of them."""

from collections.abc import Callable, Collection
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events import codec, ids, subjects
from events.contracts import STALLED_PER_PROMPT_TOKEN_S, STALLED_S
from events.log import Stored
from events.schema import (
    AttemptReleased,
    AttemptStarted,
    CancelRequested,
    ClientAttached,
    KeyRevoked,
    LaneLost,
    LaneReported,
    Parameters,
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
    ReplicaStarting,
    ReplicaStopped,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)
from rift.control.duties.agenda import WorkerLoads
from rift.control.duties.supervision import AttemptRelease, OpenRequest, Supervision

SECOND = 1_000_000_000
REQUESTS = range(5)
WORKERS = range(3)
LANES = ("lane1234", "lane5678")
MODELS = ("m", "n")
# Around the bounds of the rules: tick, repeat, cancel, lane, grace, stall, redelivery, deadline.
STEPS_S = (0.0, 0.05, 0.5, 2.0, 2.1, 5.0, 10.0, 10.1, 16.0, 31.0, 60.0, 63.0, 300.1)


class LoadsOfAll(WorkerLoads):
    """Adds up the load of a worker whenever it is needed."""

    def __init__(self, opened: dict[str, OpenRequest]) -> None:
        super().__init__()
        self._opened = opened

    def bound_ns(self, worker: str) -> int:
        tokens = sum(one.life.prompt_tokens for one in self._opened.values() if one.worker == worker)
        return int((STALLED_S + tokens * STALLED_PER_PROMPT_TOKEN_S) * SECOND)


class LookAtAll(Supervision):
    """Applies the rules to every open request each time."""

    def __init__(self) -> None:
        super().__init__()
        self._loads = LoadsOfAll(self._open)

    def _candidates(self, now_ns: int) -> Collection[str]:
        return list(self._open)


class History:
    """Gives both the same records and times, and compares their actions."""

    def __init__(self) -> None:
        self.watches = (Supervision(), LookAtAll())
        self.now_ns = 1_000 * SECOND
        self.sequence = 0
        self.addresses: dict[str, subjects.Address] = {}
        self.last_attempt: dict[str, str] = {}
        self.index: dict[str, int] = {}

    def request(self, number: int) -> str:
        at = subjects.Address(0, LANES[number % 2], MODELS[number % len(MODELS)])
        entropy = number.to_bytes(10, "big")
        request = ids.new_request_id(secret=b"s" * 32, account="dev", at=at, floor=0, entropy=entropy)
        self.addresses[request] = at
        return request

    def tell(self, request: str, event: Any) -> None:
        self.sequence += 1
        for watch in self.watches:
            watch.fold_request(event, self.addresses[request], self.sequence, self.now_ns)

    def fleet(self, event: Any) -> None:
        self.sequence += 1
        data = codec.encode("fleet", [event])
        for watch in self.watches:
            watch.replicas.fold(Stored(subjects.fleet(event.model), self.sequence, self.now_ns, data))

    def lane(self, event: Any) -> None:
        for watch in self.watches:
            watch.fold_lane(event, self.now_ns)

    def look(self) -> list[Any]:
        few, every = ([*watch.due(self.now_ns)] for watch in self.watches)
        assert sorted(map(str, few)) == sorted(map(str, every))
        return few

    # --- what can happen -------------------------------------------------------------------------------

    def accept(self, number: int, other: int) -> None:
        request = self.request(number)
        self.tell(
            request,
            RequestAccepted(
                request=request,
                account="dev",
                key=f"k{other}",
                model=self.addresses[request].model,
                kind="inference",
                input="hello",
                parameters=Parameters(),
                stream=True,
                prompt_tokens_max=10,
                deadline_ms=(20_000, 600_000, 600_000)[other],
                price_version=1,
                detached=other == 1,
            ),
        )

    def start(self, number: int, other: int) -> None:
        request = self.request(number)
        self.sequence += 1
        attempt = f"a{self.sequence}"
        self.tell(
            request,
            AttemptStarted(
                request=request,
                attempt=attempt,
                after=self.last_attempt.get(request),
                resume_index=self.index.get(request, 0),
                worker=f"w{other}",
                prompt_tokens=500 * (1 + number),
                accepted_at_ns=0,
                engine="sim",
                model_digest="",
                delivery="ack",
            ),
        )
        if request in self.watches[1]._open:
            self.last_attempt[request] = attempt

    def tokens(self, number: int, other: int) -> None:
        request = self.request(number)
        index = self.index.get(request, 0)
        attempt = self.last_attempt.get(request, "none")
        before = self.watches[1]._open.get(request)
        self.tell(request, TokensGenerated(attempt=attempt, index=index, token_ids=(1,), text="x"))
        if before is not None:
            self.index[request] = before.life.next_index

    def release(self, number: int, other: int) -> None:
        request = self.request(number)
        why = ("host", "draining", "lost")[other]
        self.tell(request, AttemptReleased(attempt=self.last_attempt.get(request, "none"), why=why))

    def cancel(self, number: int, other: int) -> None:
        request = self.request(number)
        self.tell(request, CancelRequested(request=request, why="client"))

    def finish(self, number: int, other: int) -> None:
        request = self.request(number)
        attempt = self.last_attempt.get(request)
        tokens = self.index.get(request, 0)
        self.tell(
            request, RequestFinished(request=request, attempt=attempt, reason="stop", output_tokens=tokens)
        )

    def attach(self, number: int, other: int) -> None:
        self.lane(ClientAttached(request=self.request(number)))

    def lanes_report(self, number: int, other: int) -> None:
        for lane in LANES:
            self.lane(LaneReported(lane=lane))

    def lane_lost(self, number: int, other: int) -> None:
        self.lane(LaneLost(lane=LANES[number % 2]))

    def revoke(self, number: int, other: int) -> None:
        for watch in self.watches:
            watch.fold_book(KeyRevoked(id=f"r{other}", key=f"k{other}", account="dev"))

    def outage(self, number: int, other: int) -> None:
        for watch in self.watches:
            watch.note_outage(self.now_ns)

    def begin_replica(self, number: int, other: int) -> None:
        self.fleet(ReplicaStarting(replica=f"w{other}", model=MODELS[number % 2], engine="sim"))

    def replica_ready(self, number: int, other: int) -> None:
        self.fleet(ReplicaReady(replica=f"w{other}", model=MODELS[number % 2], slots=1, start_ns=1))

    def replica_drains(self, number: int, other: int) -> None:
        self.fleet(ReplicaDraining(replica=f"w{other}", model=MODELS[number % 2]))

    def replica_stops(self, number: int, other: int) -> None:
        self.fleet(ReplicaStopped(replica=f"w{other}", model=MODELS[number % 2]))

    def replica_lost(self, number: int, other: int) -> None:
        cause = ("host", "engine", "engine")[other]
        self.fleet(ReplicaLost(replica=f"w{other}", model=MODELS[number % 2], cause=cause))

    def starts_fail(self, number: int, other: int) -> None:
        for attempt in range(3):
            name = f"s{self.sequence}.{attempt}"
            self.fleet(ReplicaStarting(replica=name, model=MODELS[number % 2], engine="sim"))
            self.fleet(ReplicaLost(replica=name, model=MODELS[number % 2], why="no weights"))

    def answer(self, number: int, other: int) -> None:
        """Store the events of the actions that are due."""
        for action in self.look():
            if isinstance(action, AttemptRelease):
                request = next(
                    name for name, attempt in self.last_attempt.items() if attempt == action.event.attempt
                )
                self.tell(request, action.event)
            elif isinstance(action, RequestFinished | CancelRequested):
                self.tell(action.request, action)
            elif isinstance(action, LaneLost):
                self.lane(action)


EVENTS = (
    *(History.accept, History.accept, History.start, History.start, History.tokens, History.tokens),
    *(History.release, History.cancel, History.finish, History.attach, History.lanes_report),
    *(History.lane_lost, History.revoke, History.outage, History.begin_replica, History.replica_ready),
    *(History.replica_drains, History.replica_stops, History.replica_lost, History.starts_fail),
    History.answer,
)
STEP = st.tuples(
    st.sampled_from(EVENTS), st.sampled_from(REQUESTS), st.sampled_from(WORKERS), st.sampled_from(STEPS_S)
)


@settings(max_examples=200)
@given(st.lists(STEP, min_size=20, max_size=80))
def test_it_acts_as_if_it_looked_at_every_request(steps: list[Any]) -> None:
    history = History()
    for number in REQUESTS:
        history.accept(number, 2)
    for step, number, other, seconds in steps:
        step(history, number, other)
        history.now_ns += int(seconds * SECOND)
        history.look()


def test_a_worker_with_fewer_prompts_stalls_sooner() -> None:
    history = History()
    for number in (0, 4):
        history.accept(number, 2)
        history.start(number, 0)
    history.now_ns += int((STALLED_S + 500 * STALLED_PER_PROMPT_TOKEN_S + 1) * SECOND)
    history.lanes_report(0, 0)
    assert history.look() == []
    history.finish(4, 0)
    assert [type(action) for action in history.look()] == [AttemptRelease]


@pytest.mark.parametrize("leave", [History.replica_drains, History.replica_stops, History.replica_lost])
def test_waiting_requests_end_when_the_last_replica_leaves_after_failed_starts(
    leave: Callable[[History, int, int], None],
) -> None:
    history = History()
    history.begin_replica(0, 1)
    history.replica_ready(0, 1)
    history.accept(0, 2)
    history.starts_fail(0, 0)
    assert history.look() == []
    leave(history, 0, 1)
    (action,) = history.look()
    assert action.error.code == "model_unavailable"


def test_a_worker_without_requests_is_forgotten() -> None:
    loads = WorkerLoads()
    loads.add("w", 10)
    loads.progressed("w", "r", 1)
    assert list(loads.silent(lambda progress_ns, bound_ns: True)) == ["r"]
    loads.remove("w", "r", 10)
    assert not loads._loads
