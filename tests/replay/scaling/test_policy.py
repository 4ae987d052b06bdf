"""Invariants of every decision, for random demands, and each rule of the policy."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.contracts import SECOND_NS
from replay.backtest.policies import Ours
from replay.backtest.simulator import SimulatedFleet, TraceRequest
from replay.scaling.demand import PASTS, Demand, Replicas
from replay.scaling.hardware import Hardware, profile, profiles
from replay.scaling.policy import RETRY_NS, Policy, bounds, decide, limit, speed_permille

R1 = profile("mi300x-deepseek-r1")
NOW_NS = 100_000 * SECOND_NS
START_NS = 60 * SECOND_NS
POLICY = Policy(replicas_max=100)

counts = st.integers(0, 2000)
demands = st.builds(
    Demand,
    now_ns=st.just(NOW_NS),
    waiting=counts,
    running=counts,
    past=st.lists(counts, min_size=PASTS, max_size=PASTS).map(tuple),
    arrived_minute=counts,
    ended=counts,
    prompt_tokens=st.integers(0, 10**7),
    output_tokens=st.integers(0, 10**7),
    decode_ns=st.integers(0, 10**15),
    decode_tokens=st.integers(0, 10**6),
    active_at_ns=st.integers(0, NOW_NS),
)
fleets = st.builds(
    Replicas,
    wanted=st.integers(0, 60),
    ready=st.integers(0, 60),
    starting=st.integers(0, 20),
    draining=st.integers(0, 20),
    start_ns=st.integers(0, 600 * SECOND_NS),
    failed=st.integers(0, 40),
    failed_at_ns=st.integers(0, NOW_NS),
    decided_at_ns=st.integers(0, NOW_NS),
    running_sum=st.integers(0, 10**5),
    tokens_per_ks_sum=st.integers(1, 10**7),
)
policies = st.builds(
    Policy,
    replicas_min=st.integers(0, 5),
    replicas_max=st.integers(0, 50),
    idle_ns=st.integers(0, 1000 * SECOND_NS),
    ttft_ms=st.integers(1, 100_000),
    hour_nanousd_max=st.integers(0, 10**12),
)
hardwares = st.sampled_from(list(profiles().values()))


@settings(max_examples=300, deadline=None)
@given(demands, fleets, policies, hardwares)
def test_never_outside_minimum_maximum_and_ceiling(
    demand: Demand, replicas: Replicas, policy: Policy, hardware: Hardware
) -> None:
    decision = decide(demand, replicas, policy, hardware)
    wanted = replicas.wanted if decision is None else decision.to_replicas
    low, high = bounds(policy, hardware)
    assert low <= wanted <= high
    assert wanted <= policy.replicas_max
    if policy.hour_nanousd_max:
        assert wanted * hardware.hour_nanousd <= policy.hour_nanousd_max


@settings(max_examples=300, deadline=None)
@given(demands, fleets, policies, hardwares)
def test_a_decision_that_holds_is_not_taken_back_at_once(
    demand: Demand, replicas: Replicas, policy: Policy, hardware: Hardware
) -> None:
    decision = decide(demand, replicas, policy, hardware)
    if decision is not None:
        assert decision.reason
        assert decision.to_replicas != replicas.wanted
        decided = msgspec.structs.replace(replicas, wanted=decision.to_replicas, decided_at_ns=demand.now_ns)
        assert decide(demand, decided, policy, hardware) is None


@settings(max_examples=300, deadline=None)
@given(demands, policies, hardwares)
def test_who_waits_for_a_model_at_zero_is_decided_on_at_once(
    demand: Demand, policy: Policy, hardware: Hardware
) -> None:
    demand = msgspec.structs.replace(demand, waiting=demand.waiting + 1)
    decision = decide(demand, Replicas(start_ns=START_NS), policy, hardware)
    if bounds(policy, hardware)[1]:
        assert decision is not None
        assert decision.to_replicas >= 1


@settings(max_examples=300, deadline=None)
@given(demands, fleets, st.integers(1, 500))
def test_more_waiting_never_wants_fewer(demand: Demand, replicas: Replicas, more: int) -> None:
    replicas = msgspec.structs.replace(replicas, wanted=0, ready=0)
    crowd = msgspec.structs.replace(demand, waiting=demand.waiting + more)
    few, many = (decide(one, replicas, POLICY, R1) for one in (demand, crowd))
    assert (few.to_replicas if few else 0) <= (many.to_replicas if many else 0)


def busy(**fields: int) -> Demand:
    """Return a demand of requests with 1,000 + 300 tokens, constant for five minutes."""
    whole = {"ended": 100, "prompt_tokens": 100_000, "output_tokens": 30_000, "active_at_ns": NOW_NS} | fields
    past = (whole.get("waiting", 0) + whole.get("running", 0),) * PASTS
    return Demand(now_ns=NOW_NS, past=past, **whole)


def test_the_first_request_starts_one() -> None:
    demand = Demand(now_ns=NOW_NS, waiting=1, arrived_minute=1, active_at_ns=NOW_NS)
    decision = decide(demand, Replicas(start_ns=START_NS), POLICY, R1)
    assert decision is not None
    assert decision.to_replicas == 1
    assert decision.reason.startswith("1 waiting and 0 running")


def test_a_burst_starts_what_holds_it_but_no_more_than_drain_it() -> None:
    long = Demand(now_ns=NOW_NS, waiting=300, arrived_minute=300, ended=10, output_tokens=20_000)
    short = msgspec.structs.replace(long, output_tokens=200)
    ordered = [decide(demand, Replicas(start_ns=START_NS), POLICY, R1) for demand in (long, short)]
    assert [decision.to_replicas for decision in ordered if decision] == [15, 1]


def test_what_is_starting_is_not_ordered_again() -> None:
    demand = Demand(now_ns=NOW_NS, waiting=300, arrived_minute=300, ended=10, output_tokens=20_000)
    assert decide(demand, Replicas(wanted=15, starting=15, start_ns=START_NS), POLICY, R1) is None


def test_fewer_only_after_two_starts_without_a_decision() -> None:
    demand = busy(running=20, arrived_minute=60)
    replicas = Replicas(wanted=4, ready=4, start_ns=START_NS, decided_at_ns=NOW_NS - 2 * START_NS)
    decision = decide(demand, replicas, POLICY, R1)
    assert decision is not None
    assert decision.to_replicas == 2
    for field, value in (("decided_at_ns", NOW_NS - 2 * START_NS + 1), ("starting", 1)):
        assert decide(demand, msgspec.structs.replace(replicas, **{field: value}), POLICY, R1) is None
    assert decide(msgspec.structs.replace(demand, waiting=1), replicas, POLICY, R1) is None
    earlier = (*demand.past[:9], 230)
    assert decide(msgspec.structs.replace(demand, past=earlier), replicas, POLICY, R1) is None


def test_idle_keeps_one_and_then_none() -> None:
    replicas = Replicas(wanted=4, ready=4, start_ns=START_NS)
    for idle_s, wanted in ((119, None), (120, 1), (299, 1), (300, 0)):
        demand = Demand(now_ns=NOW_NS, active_at_ns=NOW_NS - idle_s * SECOND_NS)
        decision = decide(demand, replicas, POLICY, R1)
        assert (decision and decision.to_replicas) == wanted, idle_s
    demand = Demand(now_ns=NOW_NS, active_at_ns=NOW_NS - 300 * SECOND_NS)
    kept = decide(demand, replicas, Policy(replicas_min=2), R1)
    assert kept is not None
    assert (kept.to_replicas, "the minimum is 2" in kept.reason) == (2, True)


def test_the_price_ceiling_is_named() -> None:
    demand = busy(waiting=500, running=64, arrived_minute=500)
    policy = Policy(replicas_max=100, hour_nanousd_max=2 * R1.hour_nanousd + 1)
    decision = decide(demand, Replicas(wanted=1, ready=1, start_ns=START_NS), policy, R1)
    assert decision is not None
    assert (decision.to_replicas, "the price ceiling pays for 2" in decision.reason) == (2, True)


def test_a_limit_is_named_while_it_holds() -> None:
    demand = busy(waiting=500, running=64, arrived_minute=500)
    two = Replicas(wanted=2, ready=2, start_ns=START_NS)
    dear = Policy(replicas_max=100, hour_nanousd_max=2 * R1.hour_nanousd + 1)
    assert decide(demand, two, dear, R1) is None
    assert limit(demand, two, dear, R1).startswith("hour_usd_max allows 2 replicas; 500 waiting")
    assert limit(demand, two, Policy(replicas_max=2), R1).startswith("max allows 2 replicas; 500 waiting")
    assert limit(demand, two, POLICY, R1) == ""
    failed = Replicas(wanted=2, start_ns=START_NS, failed=3, failed_at_ns=NOW_NS)
    assert limit(demand, failed, POLICY, R1) == "3 starts failed in a row; the next is tried in 10 s"
    assert limit(Demand(now_ns=NOW_NS), failed, POLICY, R1) == ""


def test_long_prompts_want_more_for_a_short_target() -> None:
    demand = Demand(
        now_ns=NOW_NS,
        running=10,
        past=(10,) * PASTS,
        arrived_minute=120,
        ended=10,
        prompt_tokens=100_000,
        output_tokens=3000,
    )
    wanted = []
    for ttft_ms in (1500, 5000):
        decision = decide(demand, Replicas(start_ns=START_NS), Policy(replicas_max=100, ttft_ms=ttft_ms), R1)
        assert decision is not None
        wanted.append(decision.to_replicas)
    assert wanted == [7, 3]


def test_failed_starts_are_tried_again_ever_later() -> None:
    demand = busy(waiting=100, arrived_minute=100)
    tried = Replicas(wanted=2, starting=2, start_ns=START_NS, failed=2, failed_at_ns=NOW_NS)
    assert decide(demand, tried, POLICY, R1) is None
    for failed, retry_ns in ((3, RETRY_NS), (4, 2 * RETRY_NS), (9, 60 * RETRY_NS), (90, 60 * RETRY_NS)):
        over = Replicas(wanted=2, start_ns=START_NS, failed=failed, failed_at_ns=NOW_NS - retry_ns + 1)
        decision = decide(demand, over, POLICY, R1)
        assert decision is not None
        assert decision.to_replicas == 0
        assert f"{failed} starts failed in a row" in decision.reason
        again = msgspec.structs.replace(over, wanted=0, failed_at_ns=NOW_NS - retry_ns)
        decision = decide(demand, again, POLICY, R1)
        assert decision is not None
        assert decision.to_replicas == 1
        # The replica of the retry gets time to start.
        trying = msgspec.structs.replace(again, wanted=1, starting=1, decided_at_ns=NOW_NS)
        assert decide(demand, trying, POLICY, R1) is None


def test_the_speed_is_learned_and_bounded() -> None:
    replicas = Replicas(running_sum=20, tokens_per_ks_sum=10 * R1.tokens_per_ks_at(2))
    step_ns = R1.step_us_at(2) * 1000
    for factor, permille in ((1, 1000), (1.5, 1500), (9, 2000), (0.1, 500)):
        demand = Demand(decode_ns=int(step_ns * factor) * 5000, decode_tokens=5000)
        assert speed_permille(demand, replicas, R1) == permille
    assert speed_permille(Demand(decode_ns=10**12, decode_tokens=10), replicas, R1) == 1000


@pytest.mark.parametrize(("per_s", "share"), [(0.5, 99), (2.0, 99), (8.0, 0)])
def test_a_constant_load_settles(per_s: float, share: int) -> None:
    chance = random.Random(1)
    now_s, asked = 0.0, []
    while now_s < 7200:
        now_s += chance.expovariate(per_s)
        asked.append(TraceRequest(now_s, 1000, 1 + int(chance.expovariate(1 / 500))))
    policy = Policy(replicas_max=100, share=share)
    fleet = SimulatedFleet(asked, R1, start_s=60.0, scaling=Ours(policy, R1, start_s=60.0))
    fleet.run()
    settled = [wanted for at_s, wanted, _ in fleet.statistics.history if at_s > 2400]
    assert len(settled) <= 6
    assert max(settled, default=0) - min(settled, default=0) <= 1
    late = [
        wait_s
        for one, wait_s in zip(asked, fleet.statistics.ttft_s, strict=True)
        if one.at_s > 600 and wait_s > 2
    ]
    assert len(late) < 0.01 * len(asked)
