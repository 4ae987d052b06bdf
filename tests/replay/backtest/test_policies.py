"""Knative's rules against cases computed by hand, and our policy fed as in production."""

import random

import pytest

from replay.backtest.policies import Knative, KnativeSettings, Ours
from replay.backtest.simulator import SimulatedFleet, TraceRequest
from replay.scaling.demand import Replicas
from replay.scaling.hardware import profile
from replay.scaling.policy import Policy, speed_permille

R1 = profile("mi300x-deepseek-r1")
TEN = KnativeSettings(target=10.0)


def test_stable_rounds_up_and_falls_by_half_at_most() -> None:
    knative = Knative(TEN)
    assert knative.desired(0, ready=3, stable=30.0, panic=30.0) == 3
    assert knative.desired(2, ready=3, stable=30.1, panic=30.1) == 4
    assert knative.desired(4, ready=9, stable=1.0, panic=1.0) == 4
    assert knative.desired(6, ready=1, stable=0.0, panic=0.0) == 0


def test_panic_at_twice_what_is_ready_until_a_stable_window_after() -> None:
    knative = Knative(TEN)
    assert knative.desired(0, ready=2, stable=15.0, panic=30.1) == 4
    # While it panics it never scales down. Meeting the threshold again extends the panic.
    assert knative.desired(10, ready=4, stable=15.0, panic=10.0) == 4
    assert knative.desired(20, ready=4, stable=15.0, panic=71.0) == 8
    assert knative.desired(80, ready=8, stable=15.0, panic=10.0) == 8
    assert knative.desired(81, ready=8, stable=15.0, panic=10.0) == 4


def test_below_twice_it_does_not_panic() -> None:
    knative = Knative(TEN)
    assert knative.desired(0, ready=2, stable=15.0, panic=30.0) == 2


def test_none_ready_counts_as_one() -> None:
    knative = Knative(TEN)
    assert knative.desired(0, ready=0, stable=5.0, panic=5.0) == 1
    assert knative.desired(2, ready=0, stable=5.0, panic=11.0) == 2


def test_it_rises_by_its_rate_at_most() -> None:
    knative = Knative(KnativeSettings(target=1.0, up_rate=10.0))
    assert knative.desired(0, ready=2, stable=500.0, panic=500.0) == 20


def test_one_request_starts_one_at_once_and_it_goes_90_s_after() -> None:
    """The delay is an empty stable window, rounded up to a tick of two seconds, and 30 s of grace."""
    asked = [TraceRequest(0.0, 0, 101), TraceRequest(400.0, 0, 1)]
    fleet = SimulatedFleet(asked, R1, start_s=5.0, scaling=Knative(TEN))
    fleet.run()
    (_, first, _), _, (gone_s, gone, _), (again_s, again, _), _ = fleet.statistics.history
    assert (first, gone, again, again_s) == (1, 0, 1, 400.0)
    ended_s = 5.0 + 100 * 0.015
    assert ended_s + 90 <= gone_s <= ended_s + 95


def test_concurrency_counts_what_waits_and_is_an_average_over_the_seconds_there_were() -> None:
    """45 requests at once, no replica for 100 s: the activator reports 1, then two seconds have 45."""
    asked = [TraceRequest(0.0, 0, 1000) for _ in range(45)]
    fleet = SimulatedFleet(asked, R1, start_s=100.0, scaling=Knative(TEN))
    fleet.run()
    # (1 + 45 + 45) / 3 is 30.3. After ten seconds the stable mean is 41 and the panic mean 45.
    assert fleet.statistics.history[:2] == [(0.0, 1, 0), (2.0, 4, 0)]
    assert max(wanted for _, wanted, _ in fleet.statistics.history) == 5


@pytest.mark.parametrize(("start_s", "silence_s"), [(15.0, 0), (60.0, 0), (60.0, 400)])
def test_ours_learns_nothing_false_of_a_fleet_that_is_as_its_profile_says(
    start_s: float, silence_s: int
) -> None:
    """With silences the fleet starts from zero, and its load varies between a crowd and a few."""
    chance = random.Random(2)
    asked = [
        TraceRequest(number / 4 + number // 400 * silence_s, 500, 1 + int(chance.expovariate(1 / 400)))
        for number in range(4000)
    ]
    ours = Ours(Policy(replicas_max=50), R1, start_s=start_s)
    fleet = SimulatedFleet(asked, R1, start_s=start_s, scaling=ours)
    learned: list[int] = []
    decide = ours.decide

    def watched(now_s: float, fleet: SimulatedFleet) -> int | None:
        now_ns = int(now_s * 1e9)
        total, tokens = ours._reports.at(now_ns)
        replicas = Replicas(running_sum=total, tokens_per_ks_sum=tokens)
        learned.append(speed_permille(ours._demands.at(now_ns), replicas, R1))
        return decide(now_s, fleet)

    ours.decide = watched  # type: ignore[method-assign]
    fleet.run()
    settled = learned[len(learned) // 2 :]
    assert 850 <= min(settled) <= max(settled) <= 1150
