"""The SQL over the warehouse gives the same Demand as the in-memory one, as of any moment."""

import random
from typing import Any

import pytest

from events import subjects
from events.schema import CancelRequested, ReplicaReported, RequestFinished, ScaleDecided, ScalePlanned
from events.subjects import Address
from replay.scaling import arrivals, demand_query, verify
from replay.scaling.arrivals import Arrivals
from replay.scaling.demand import ENDED_NS, SPEED_NS, Demand, Demands, Reports
from replay.scaling.demand_query import Moment, observed
from replay.scaling.hardware import profile
from replay.scaling.policy import POLICY
from replay.warehouse.warehouse import Warehouse
from tests.replay.conftest import AT

R1 = profile("mi300x-deepseek-r1")

SECOND = 1_000_000_000
OTHER = Address(1, "lanebbbb", "tiny-1")
IDLE_NS = 300 * SECOND
LONG_TOKENS = 25


class Story:
    """Writes a history of one model on two shards, and reports the same requests to `Demands` in the order of
    their stored times. The second shard's broker has a clock of its own, `skew_ns` ahead."""

    def __init__(self, scribe: Any, dice: random.Random, skew_ns: int) -> None:
        self.scribe, self.dice, self.skew_ns = scribe, dice, skew_ns
        self.told: list[tuple[int, str, str, dict[str, int]]] = []
        self.reports = Reports(R1)
        self.waiting: list[tuple[str, Address]] = []
        self.running: dict[str, dict[str, Any]] = {}
        self.moments: list[tuple[Moment, Demand, tuple[int, int], Arrivals]] = []

    def step(self) -> None:
        self.scribe.now_ns += self.dice.choice((0, 1, SECOND // 3, 2 * SECOND, 20 * SECOND, 90 * SECOND))
        choice = self.dice.choice(
            ("accept", "accept", "start", "start", "tokens", "end", "end", "drop", "report")
        )
        getattr(self, choice)()
        if self.dice.random() < 0.3:
            self.look()

    def look(self) -> None:
        stored_ns = max(messages[-1].stored_at_ns for messages in self.scribe.streams.values())
        now_ns = stored_ns + self.dice.choice((0, 0, 1, 5 * SECOND, SPEED_NS, ENDED_NS))
        positions = {stream: len(messages) for stream, messages in self.scribe.streams.items()}
        positions.pop(subjects.BOOK, None)
        demands = Demands(long_tokens=LONG_TOKENS)
        for at_ns, what, request, sums in sorted(self.told, key=lambda told: told[0]):
            getattr(demands, what)(request, at_ns, **sums)
        moment, recent = Moment(positions, now_ns), demands.arrivals.at(now_ns)
        self.moments.append((moment, demands.at(now_ns), self.reports.at(now_ns), recent))

    def tell(self, event: Any, *, at: Address, kind: str = "work") -> int:
        """Write a record and return its stored time."""
        skew_ns = self.skew_ns if at == OTHER else 0
        self.scribe.now_ns += skew_ns
        self.scribe.tell(event, at=at, kind=kind)
        at_ns = self.scribe.now_ns
        self.scribe.now_ns -= skew_ns
        return at_ns

    def accept(self) -> None:
        at = self.dice.choice((AT, OTHER))
        request = self.scribe.request_id(at=at)
        at_ns = self.tell(self.scribe.accepted(request), at=at, kind="request")
        self.told.append((at_ns, "accepted", request, {}))
        self.waiting.append((request, at))

    def start(self) -> None:
        if not self.waiting:
            return
        request, at = self.waiting.pop(self.dice.randrange(len(self.waiting)))
        attempt, prompt = self.scribe.unique("att"), self.dice.randrange(1, 50)
        at_ns = self.tell(self.scribe.started(request, attempt, prompt_tokens=prompt), at=at)
        self.told.append((at_ns, "started", request, {}))
        run = {"at": at, "attempt": attempt, "prompt": prompt, "tokens": 0, "first": 0, "last": 0}
        self.running[request] = run

    def tokens(self) -> None:
        if not self.running:
            return
        run = self.running[self.dice.choice(list(self.running))]
        count = self.dice.randrange(1, 4)
        run["last"] = self.tell(self.scribe.tokens_of(run["attempt"], run["tokens"], count), at=run["at"])
        run["first"] = run["first"] or run["last"]
        run["tokens"] += count

    def end(self) -> None:
        if not self.running:
            return
        request = self.dice.choice(list(self.running))
        run = self.running.pop(request)
        end = RequestFinished(
            request=request, attempt=run["attempt"], reason="stop", output_tokens=run["tokens"]
        )
        at_ns = self.tell(end, at=run["at"])
        decode_ns = run["last"] - run["first"]
        self.note_end(request, at_ns, run["prompt"], run["tokens"], decode_ns)

    def drop(self) -> None:
        if not self.waiting:
            return
        request, at = self.waiting.pop()
        at_ns = self.tell(CancelRequested(request=request, why="client"), at=at, kind="cancel")
        self.note_end(request, at_ns, 0, 0, 0)

    def note_end(self, request: str, at_ns: int, prompt: int, output: int, decode_ns: int) -> None:
        sums = {"prompt_tokens": prompt, "output_tokens": output, "decode_ns": decode_ns}
        self.told.append((at_ns, "ended", request, sums))

    def report(self) -> None:
        running = self.dice.randrange(0, 9)
        self.scribe.fleet(ReplicaReported(replica="r", model="tiny:1", running=running, waiting=0))
        self.reports.reported(self.scribe.now_ns, running)


@pytest.mark.parametrize("seed", range(12))
def test_sql_counts_as_memory_does(
    scribe: Any, warehouse: Warehouse, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (arrivals, demand_query):
        # Some of the stories reach back for the first requests of the window, and some do not.
        monkeypatch.setattr(module, "REQUESTS_MIN", (4, 1000)[seed % 2])
        monkeypatch.setattr(module, "REQUESTS_LONG", (8, 1000)[seed % 2])
        monkeypatch.setattr(module, "WINDOW_NS", 600 * SECOND)
        monkeypatch.setattr(module, "WINDOW_NS_LONG", 1200 * SECOND)
        monkeypatch.setattr(module, "WINDOW_NS_MAX", 2400 * SECOND)
    scribe.prices()
    skew_ns = (0, 2 * SECOND, -2 * SECOND, -600 * SECOND)[seed % 4]
    story = Story(scribe, random.Random(seed), skew_ns)
    for _ in range(120):
        story.step()
    story.look()
    for stream in sorted(scribe.streams, key=lambda name: name != subjects.BOOK):
        warehouse.apply(stream, scribe.streams[stream])
    for moment, demand, reports, recent in story.moments:
        assert observed(warehouse.read, "tiny:1", moment, R1, idle_ns=IDLE_NS) == (demand, reports)
        read = demand_query.arrivals(warehouse.read, "tiny:1", moment, long_tokens=LONG_TOKENS)
        assert read == recent
    if seed:
        return
    assert any(recent.slots and recent.slots[0].at > recent.oldest for *_, recent in story.moments)
    assert any(
        slot.long and slot.ended < slot.requests for *_, recent in story.moments for slot in recent.slots
    )


def test_another_models_requests_are_not_counted(scribe: Any, warehouse: Warehouse) -> None:
    scribe.prices()
    scribe.accept()
    for stream in sorted(scribe.streams, key=lambda name: name != subjects.BOOK):
        warehouse.apply(stream, scribe.streams[stream])
    moment = Moment({"RIFT_0": 1}, scribe.now_ns)
    assert observed(warehouse.read, "tiny:1", moment, R1, idle_ns=0)[0].waiting == 1
    assert observed(warehouse.read, "other:1", moment, R1, idle_ns=0)[0] == Demand(now_ns=scribe.now_ns)


def test_decisions_and_plans_of_another_policy_are_counted_and_not_made_again(
    scribe: Any, warehouse: Warehouse
) -> None:
    scribe.prices()
    made = {"policy": "pool-1", "positions": {}, "inputs": {}}
    plan = {"floor": 1, "restart": 1, "from_ns": 0, "planned_at_ns": 1, "requests": 1, "sha256": "0" * 64}
    scribe.fleet(ScalePlanned(model="tiny:1", **made, **plan))
    decision = {"from_replicas": 0, "to_replicas": 1, "reason": "", "decided_at_ns": 1}
    scribe.fleet(ScaleDecided(model="tiny:1", **made, **decision))
    scribe.fleet(ScaleDecided(model="tiny:1", **made | {"policy": POLICY}, **decision))
    for stream in sorted(scribe.streams, key=lambda name: name != subjects.BOOK):
        warehouse.apply(stream, scribe.streams[stream])
    assert verify.unverified(warehouse) == 2
    (line,) = verify.differences(warehouse)
    assert "its inputs are not those of policy" in line
