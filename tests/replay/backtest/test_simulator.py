"""The simulated fleet: every request ends once, at the time that a slow reference computes."""

import random
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest

from replay.backtest.policies import Static
from replay.backtest.simulator import NothingStarts, SimulatedFleet, TraceRequest
from replay.scaling.demand import Demands
from replay.scaling.hardware import Hardware, profile

R1 = profile("mi300x-deepseek-r1")
SMALL = msgspec.structs.replace(R1, running_max=3, kv_tokens=4000)


class RecordedDemands(Demands):
    """Records when each request was accepted, started and ended."""

    def __init__(self) -> None:
        super().__init__()
        self.happened: list[tuple[str, int]] = []
        self.ended_s: dict[int, float] = {}

    def accepted(self, request: object, at_ns: int) -> None:
        super().accepted(request, at_ns)
        self.happened.append(("accepted", int(str(request))))

    def started(self, request: object, at_ns: int) -> None:
        super().started(request, at_ns)
        self.happened.append(("started", int(str(request))))

    def ended(
        self, request: object, at_ns: int, *, prompt_tokens: int, output_tokens: int, decode_ns: int
    ) -> None:
        super().ended(
            request, at_ns, prompt_tokens=prompt_tokens, output_tokens=output_tokens, decode_ns=decode_ns
        )
        self.happened.append(("ended", int(str(request))))
        self.ended_s[int(str(request))] = at_ns / 1e9


class Planned:
    """Sets the planned number of replicas from each time on, and records the reported requests."""

    tick_s = 1.0

    def __init__(self, *plan: tuple[float, int]) -> None:
        self.recorded = RecordedDemands()
        self.demands: Demands | None = self.recorded
        self._plan = plan

    def decide(self, now_s: float, fleet: SimulatedFleet) -> int | None:
        return [wanted for at_s, wanted in self._plan if at_s <= now_s][-1]


def some(seed: int, count: int, per_s: float) -> list[TraceRequest]:
    chance = random.Random(seed)
    now_s, asked = 0.0, []
    for _ in range(count):
        asked.append(TraceRequest(now_s, chance.randrange(0, 1500), chance.choice([1, 2, 40, 300])))
        now_s += chance.expovariate(per_s)
    return asked


def reference(
    asked: Sequence[TraceRequest], hardware: Hardware, ready_s: Sequence[float]
) -> dict[int, float]:
    """Return each request's end, by stepping from event to event with each request's remaining tokens."""
    now_s = 0.0
    waiting: list[int] = []
    came = 0
    free_s = list(ready_s)
    prompts: list[list[tuple[float, int]]] = [[] for _ in ready_s]
    # In the order in which the replicas ask: behind the others after each request.
    turns: list[int] = []
    remaining: list[dict[int, float]] = [{} for _ in ready_s]
    ended: dict[int, float] = {}

    def load(replica: int) -> list[int]:
        return [*remaining[replica], *(number for _, number in prompts[replica])]

    def tokens(numbers: Sequence[int]) -> int:
        return sum(asked[number].prompt_tokens + asked[number].output_tokens for number in numbers)

    while len(ended) < len(asked):
        steps = [hardware.step_us_at(len(going)) / 1e6 for going in remaining]
        times = [asked[came].at_s] if came < len(asked) else []
        times += [at_s for at_s in ready_s if at_s > now_s]
        times += [at_s for line in prompts for at_s, _ in line]
        times += [
            now_s + rest * step
            for going, step in zip(remaining, steps, strict=True)
            for rest in going.values()
        ]
        next_s = min(times)
        for going, step in zip(remaining, steps, strict=True):
            for number in going:
                going[number] -= (next_s - now_s) / step
        now_s = next_s
        for replica, going in enumerate(remaining):
            for number in [number for number, rest in going.items() if rest < 1e-6]:
                del going[number]
                ended[number] = now_s
            while prompts[replica] and prompts[replica][0][0] <= now_s:
                _, number = prompts[replica].pop(0)
                if asked[number].output_tokens > 1:
                    going[number] = asked[number].output_tokens - 1
                else:
                    ended[number] = now_s
        while came < len(asked) and asked[came].at_s <= now_s:
            waiting.append(came)
            came += 1
        turns += [one for one, at_s in enumerate(ready_s) if at_s <= now_s and one not in turns]
        while waiting:
            able = [
                replica
                for replica in turns
                # The prompts of half of the target: 1 s.
                if sum(asked[number].prompt_tokens for _, number in prompts[replica])
                < hardware.prefill_tokens_per_s
                and (
                    not load(replica)
                    or (
                        len(load(replica)) < hardware.running_max
                        and tokens([*load(replica), waiting[0]]) <= hardware.kv_tokens
                    )
                )
            ]
            if not able:
                break
            replica = able[0]
            turns.remove(replica)
            turns.append(replica)
            number = waiting.pop(0)
            free_s[replica] = (
                max(free_s[replica], now_s) + asked[number].prompt_tokens / hardware.prefill_tokens_per_s
            )
            prompts[replica].append((free_s[replica], number))
    return ended


@pytest.mark.parametrize("hardware", [R1, SMALL], ids=["slots", "few slots, little room"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("replicas", [1, 3])
def test_requests_end_when_a_slow_reference_says(hardware: Hardware, seed: int, replicas: int) -> None:
    asked = some(seed, 120, per_s=3.0)
    planned = Planned(*((float(more), more + 1) for more in range(replicas)))
    SimulatedFleet(asked, hardware, start_s=5.0, scaling=planned).run()
    expected = reference(asked, hardware, [5.0 + more for more in range(replicas)])
    assert planned.recorded.ended_s == pytest.approx(expected, abs=1e-4)


def test_every_request_is_accepted_started_and_ended_once() -> None:
    asked = some(7, 800, per_s=4.0)
    planned = Planned((0.0, 1), (20.0, 6), (60.0, 2), (61.0, 5), (62.0, 0), (90.0, 3))
    fleet = SimulatedFleet(asked, SMALL, start_s=10.0, scaling=planned)
    fleet.run()
    assert Counter(planned.recorded.happened) == {
        (what, number): 1 for what in ("accepted", "started", "ended") for number in range(800)
    }
    assert fleet.concurrency.under_way == 0
    assert min(fleet.statistics.ttft_s) > 0
    assert fleet.statistics.scale_actions == 6
    assert fleet.replicas.ordered >= 6


def test_seconds_count_from_the_order_to_the_stop() -> None:
    asked = [TraceRequest(0.0, 15_000, 1001), TraceRequest(100.0, 0, 1)]
    planned = Planned((0.0, 2), (11.5, 1), (50.0, 0), (100.0, 1))
    fleet = SimulatedFleet(asked, R1, start_s=10.0, scaling=planned)
    fleet.run()
    # The first replica prefills from 10 s to 11 s, then takes 1,000 steps of 15 ms. The idle replica stops at
    # the first tick after 11.5 s. The busy one is removed at 50 s, after its request has ended. The third is
    # ordered at 100 s.
    assert fleet.statistics.ttft_s == [11.0, 10.0]
    assert planned.recorded.ended_s == pytest.approx({0: 26.0, 1: 110.0})
    assert fleet.replicas.stopped_s == pytest.approx(12.0 + 50.0 + 10.0)
    assert (fleet.replicas.ordered, fleet.statistics.waited_for_start, fleet.statistics.scale_actions) == (
        3,
        2,
        4,
    )


def test_a_draining_replica_takes_nothing_and_stops_once_it_is_empty() -> None:
    asked = [TraceRequest(0.0, 0, 1001), TraceRequest(6.0, 0, 1)]
    planned = Planned((0.0, 1), (5.0, 0), (6.0, 1))
    fleet = SimulatedFleet(asked, R1, start_s=1.0, scaling=planned)
    fleet.run()
    assert planned.recorded.ended_s == pytest.approx({0: 16.0, 1: 7.0})
    assert fleet.replicas.stopped_s == pytest.approx(16.0 + 10.0)


def test_starting_replicas_are_given_up_first() -> None:
    planned = Planned((0.0, 1), (20.0, 3), (21.0, 1))
    fleet = SimulatedFleet([TraceRequest(0.0, 0, 5000)], R1, start_s=10.0, scaling=planned)
    fleet.run()
    assert fleet.replicas.stopped_s == pytest.approx(10 + 4999 * 0.015 + 2)


def test_a_request_with_more_tokens_than_there_is_room_for_runs_alone() -> None:
    asked = [TraceRequest(0.0, 5000, 10), TraceRequest(0.0, 100, 10)]
    planned = Planned((0.0, 1))
    SimulatedFleet(asked, SMALL, start_s=0.0, scaling=planned).run()
    assert planned.recorded.happened[-2:] == [("started", 1), ("ended", 1)]


def test_a_policy_that_starts_nothing_is_named() -> None:
    with pytest.raises(NothingStarts, match="2 requests wait"):
        SimulatedFleet(some(1, 2, per_s=1.0), R1, start_s=1.0, scaling=Static(0)).run()


def test_progress_is_told_in_shares() -> None:
    shares: list[float] = []
    SimulatedFleet(some(1, 3000, per_s=2.0), R1, start_s=1.0, scaling=Static(2)).run(shares.append)
    assert shares
    assert shares == sorted(shares)
    assert shares[-1] <= 1
