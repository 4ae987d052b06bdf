"""The floor of a past computed by hand, its bounds, and the plans that hold."""

import random

import msgspec
import pytest

from events import codec, subjects
from events.contracts import SECOND_NS
from events.fleet import Planned
from events.schema import ScalePlanned
from replay.backtest.policies import Static
from replay.backtest.simulator import SimulatedFleet, TraceRequest
from replay.scaling.arrivals import REQUESTS_LONG, REQUESTS_MIN, SLOT_NS, Arrivals, RecentArrivals, Slot
from replay.scaling.demand import Demand, Replicas
from replay.scaling.floor import (
    HOLD_NS,
    YOUNG_NS,
    FloorTerms,
    Plan,
    digest,
    has_floor,
    held,
    is_new,
    planned,
    terms_of,
    too_long,
)
from replay.scaling.hardware import profile
from replay.scaling.policy import NO_FLOOR, POLICY, Floor, Policy, decide, limit

R1 = profile("mi300x-deepseek-r1")
HOUR_NS = 3600 * SECOND_NS
# The most replays that a search among 100 replicas takes.
TRIES = 14
# Ten requests a second fill one replica's prompts, and a step takes 10 ms under any load.
TERMS = FloorTerms(
    share=99,
    ttft_ms=1000,
    low=0,
    high=20,
    guess=0,
    idle_ns=300 * SECOND_NS,
    start_ns=60 * SECOND_NS,
    speed_permille=1000,
    running_max=10,
    kv_tokens=1_000_000,
    prefill_tokens_per_s=1000,
    step_us=10_000,
    step_us_per_running=0,
)


def arrivals(*at: tuple[float, int], prompt: int = 100, output: int = 1, long: int = 0) -> Arrivals:
    """Return ended requests of equal lengths: pairs of a second and a number, in a log of an old age."""
    slots = [
        Slot(int(second * 4), n, n, n * prompt, n * output, n * output * output, n if long else 0)
        for second, n in at
    ]
    return Arrivals(int(at[-1][0] * SECOND_NS) + SECOND_NS, slots[0].at - YOUNG_NS // SLOT_NS, slots)


def of_trace(trace: list[TraceRequest], *, until_s: float) -> Arrivals:
    recent = RecentArrivals(long_tokens=30_000)
    for one in trace:
        if one.at_s < until_s:
            recent.accepted(int(one.at_s * 1e9))
            recent.ended(
                int(one.at_s * 1e9), prompt_tokens=one.prompt_tokens, output_tokens=one.output_tokens
            )
    return recent.at(int(until_s * 1e9))


def test_the_prompts_before_a_request_make_it_late() -> None:
    """Each prompt takes 0.1 s. Of 40 at once a replica fills ten in time, the first after 0.1 s."""
    plan = planned(arrivals((1000, 40)), TERMS)
    assert plan.replicas == 5
    # The k-th of them waits k / 40 of four seconds divided by the replicas, and 0.1 s for itself.
    assert dict(plan.candidates)[4] == 40 - 37
    assert dict(plan.candidates)[5] == 0
    assert (plan.counted, plan.is_missed, plan.restart) == (40, False, 5)


def test_a_request_that_waits_for_a_place_is_late() -> None:
    """Ten places, each taken for 10 s: of 40 requests in four seconds, those of the last three must wait."""
    often = [(1000 + second, 10) for second in range(4)]
    assert planned(arrivals(*often, prompt=0, output=1000), TERMS).replicas == 4
    assert planned(arrivals(*often, prompt=0, output=10), TERMS).replicas == 1


def test_a_share_of_the_requests_may_be_late() -> None:
    """One of the 40 prompts is late for each 2.5 per cent."""
    for share, replicas in ((100, 5), (92, 4), (40, 2), (1, 1)):
        terms = msgspec.structs.replace(TERMS, share=share)
        assert planned(arrivals((1000, 40)), terms).replicas == replicas, share


def test_prompts_that_are_too_long_count_as_work_alone() -> None:
    past = arrivals((1000, 4), prompt=2000, long=1)
    plan = planned(past, TERMS)
    assert (plan.replicas, plan.counted) == (1, 0)
    # The request after them waits for eight seconds of prefill.
    later = Arrivals(past.now_ns, past.oldest, [*past.slots, Slot(4004, 1, 1, 100, 1, 1, 0)])
    assert planned(later, TERMS).replicas == 5


def test_without_a_share_or_requests_there_is_no_floor() -> None:
    assert planned(Arrivals(0, 0, []), TERMS) == Plan()
    assert planned(arrivals((1000, 40)), msgspec.structs.replace(TERMS, share=0)) == Plan()
    assert planned(arrivals((1000, 40)), msgspec.structs.replace(TERMS, high=0)) == Plan()


def test_a_maximum_that_misses_takes_the_fewest_that_come_close() -> None:
    """Of 2,000 prompts at once 20 replicas serve some 200 in time, and 0.5 % is ten of them."""
    plan = planned(arrivals((1000, 2000)), TERMS)
    assert plan.is_missed
    late = dict(plan.candidates)
    assert late[plan.replicas] <= late[20] + 10 < late[plan.replicas - 1]
    assert 1 < plan.replicas < 20


def test_the_guess_changes_no_result() -> None:
    past = arrivals(*((1000 + 2 * at, at % 37) for at in range(1, 300) if at % 37))
    plans = [
        planned(past, msgspec.structs.replace(TERMS, guess=guess, high=100)) for guess in range(1, 101, 5)
    ]
    assert len({plan.replicas for plan in plans}) == 1
    assert max(len(plan.candidates) for plan in plans) <= TRIES


def test_a_plan_of_many_shards_is_a_small_record() -> None:
    shards = {subjects.shard_stream(shard): 10**9 + shard for shard in range(64)}
    # A shard that is open without its predecessor.
    positions = shards | {subjects.shard_stream(70): 5, subjects.FLEET: 10**6}
    others, shard_positions = subjects.unnamed(positions)
    tried = tuple((replicas, 100_000 - replicas) for replicas in range(100 - TRIES, 100))
    plan = ScalePlanned(
        model="meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8",
        floor=99,
        restart=99,
        policy=POLICY,
        positions=others,
        shard_positions=shard_positions,
        from_ns=10**18,
        planned_at_ns=10**18,
        requests=10**6,
        sha256="a" * 64,
        inputs=msgspec.structs.asdict(TERMS),
        candidates=tried,
        restarts=tried,
        is_missed=True,
        epoch=100,
    )
    assert len(codec.encode("autoscaler", [plan])) < 2048
    assert subjects.named(others, shard_positions) == positions


def test_a_young_log_counts_replicas_as_slower() -> None:
    old = arrivals((1000, 40))
    floors = [
        planned(msgspec.structs.replace(old, oldest=old.now_ns // SLOT_NS - age_s * 4), TERMS).replicas
        for age_s in (0, 600, 1199, 1200, 5000)
    ]
    assert floors == [7, 6, 5, 5, 5]
    # One prompt that nearly takes the target by itself is in time with one replica, at any age.
    alone = arrivals((1000, 1), prompt=TERMS.prefill_tokens_per_s * TERMS.ttft_ms * 8 // 10_000)
    plan = planned(msgspec.structs.replace(alone, oldest=alone.now_ns // SLOT_NS), TERMS)
    assert (plan.replicas, plan.is_missed) == (1, False)


def test_requests_after_a_silence_are_left_out_and_size_the_restart() -> None:
    quiet = arrivals((100, 1), (1000, 40), (1059, 30), (1060, 1), prompt=1)
    plan = planned(quiet, TERMS)
    # The 40 and the 30 wait for the start.
    assert plan.counted == 2
    heavy = [(100, 100), *((1000 + at, 2) for at in range(100))]
    plan = planned(arrivals(*heavy, prompt=50, output=2000), msgspec.structs.replace(TERMS, share=95))
    assert plan.restart > plan.replicas
    # With a replica that stays, nothing starts from zero.
    always = msgspec.structs.replace(TERMS, low=1)
    assert planned(arrivals(*heavy, prompt=50, output=2000), always).restarts == ()


def test_the_floor_agrees_with_the_simulated_fleet() -> None:
    """Under random load the replayed fleet is late where the simulated one is, to half a point."""
    chance = random.Random(5)
    trace, now_s = [], 0.0
    while now_s < 3600:
        now_s += chance.expovariate(5 if now_s % 600 < 300 else 1)
        trace.append(
            TraceRequest(now_s, int(chance.expovariate(1 / 900)), 1 + int(chance.expovariate(1 / 400)))
        )
    terms = terms_of(Demand(), Replicas(), Policy(replicas_max=9, ttft_ms=2000), R1, ())
    plan = planned(of_trace(trace, until_s=3600), terms)
    for replicas, late in plan.candidates:
        fleet = SimulatedFleet(trace, R1, start_s=0.0, scaling=Static(replicas))
        fleet.run()
        simulated = sum(ttft_s > 2 for ttft_s in fleet.statistics.ttft_s)
        assert (simulated <= len(trace) // 100) == (late <= plan.counted // 100)
    assert plan.replicas == 3


def test_an_hour_or_the_last_requests_are_replayed() -> None:
    recent = RecentArrivals(long_tokens=0)
    for at_s in range(0, 90_000, 10):
        recent.accepted(at_s * SECOND_NS)
    past = recent.at(90_000 * SECOND_NS)
    assert sum(slot.requests for slot in past.slots) == REQUESTS_MIN
    assert past.oldest * SLOT_NS == (90_000 - 86_400 + 10) * SECOND_NS
    for more, window_s in ((REQUESTS_MIN, 4 * 3600), (REQUESTS_LONG, 3600)):
        for _ in range(more):
            recent.accepted(90_001 * SECOND_NS)
        past = recent.at(90_002 * SECOND_NS)
        assert window_s - 10 <= 90_002 - past.slots[0].at * SLOT_NS // SECOND_NS < window_s


def plan_at(at_s: float, floor: int, restart: int = 0) -> Planned:
    return Planned(int(at_s), int(at_s * SECOND_NS), floor, restart, False, "p")


def test_the_highest_floor_of_five_minutes_holds() -> None:
    plans = [plan_at(100, 5, 7), plan_at(400, 2, 3), plan_at(1000, 3, 3)]
    assert held((), HOUR_NS) == NO_FLOOR
    # Five held until 400 s, and so counts until 700 s.
    assert held(plans[:2], 699 * SECOND_NS) == Floor(replicas=5, restart=7, plan=100)
    assert held(plans[:2], 700 * SECOND_NS) == Floor(replicas=2, restart=3, plan=400)
    assert held(plans[:1], 9000 * SECOND_NS) == Floor(replicas=5, restart=7, plan=100)
    assert held(plans, 1000 * SECOND_NS) == Floor(replicas=3, restart=3, plan=1000)
    assert HOLD_NS == 300 * SECOND_NS


def test_a_plan_that_says_the_same_is_not_new() -> None:
    assert not is_new(Plan(), (), "p")
    assert is_new(Plan(replicas=1, restart=1), (), "p")
    last = (plan_at(1, 2, 3),)
    assert not is_new(Plan(replicas=2, restart=3), last, "p")
    for other in (Plan(replicas=3, restart=3), Plan(replicas=2, restart=2), Plan(2, 3, is_missed=True)):
        assert is_new(other, last, "p")
    assert is_new(Plan(replicas=2, restart=3), last, "q")


NOW_NS = 10 * HOUR_NS
BUSY = Demand(now_ns=NOW_NS, running=1, active_at_ns=NOW_NS)
TEN = Policy(replicas_max=10)


def test_decide_keeps_the_floor_within_the_bounds() -> None:
    ready = Replicas(wanted=1, ready=1, start_ns=SECOND_NS)
    for floor, policy, replicas in (
        (Floor(replicas=4), TEN, 4),
        (Floor(replicas=40), TEN, 10),
        (Floor(replicas=4, restart=9), TEN, 4),
        (Floor(replicas=4), Policy(replicas_max=10, hour_nanousd_max=2 * R1.hour_nanousd), 2),
    ):
        decision = decide(BUSY, ready, policy, R1, floor)
        assert decision is not None
        assert decision.to_replicas == replicas
    starting = decide(BUSY, Replicas(), TEN, R1, Floor(replicas=4, restart=9))
    assert starting is not None
    assert (starting.to_replicas, "9 replicas would have served 99 % of" in starting.reason) == (
        9,
        True,
    )


@pytest.mark.parametrize(
    ("warm_s", "idle_s", "replicas"), [(0, 299, 4), (0, 300, 0), (3600, 3599, 4), (3600, 3600, 0)]
)
def test_silence_ends_the_floor(warm_s: int, idle_s: int, replicas: int) -> None:
    idle = Demand(now_ns=NOW_NS, active_at_ns=NOW_NS - idle_s * SECOND_NS)
    policy = Policy(replicas_max=10, warm_ns=warm_s * SECOND_NS)
    decision = decide(idle, Replicas(wanted=4, ready=4), policy, R1, Floor(replicas=4, restart=9))
    assert (4 if decision is None else decision.to_replicas) == replicas


def test_a_missed_share_is_said() -> None:
    ready = Replicas(wanted=1, ready=1)
    missed = Floor(replicas=8, missed=1)
    decision = decide(BUSY, ready, Policy(replicas_max=8), R1, missed)
    assert decision is not None
    assert "8 replicas would have served fewer than 99 % of" in decision.reason
    assert "max allows 8 replicas" in limit(BUSY, ready, Policy(replicas_max=8), R1, missed)
    assert limit(BUSY, ready, Policy(replicas_max=8), R1, Floor(replicas=8)) == ""


def test_a_floor_is_worth_a_replay_if_it_can_change_something() -> None:
    hour_ns = HOUR_NS
    for policy, expected in (
        (Policy(replicas_max=2), True),
        (Policy(replicas_max=1), False),
        (Policy(replicas_max=1, warm_ns=hour_ns), True),
        (Policy(replicas_min=2, replicas_max=2), False),
        (Policy(replicas_max=2, share=0), False),
    ):
        assert has_floor(policy, R1) == expected, policy


def test_the_digest_is_that_of_arrivals_and_terms() -> None:
    past = arrivals((1000, 4))
    same = digest(arrivals((1000, 4)), TERMS)
    assert digest(past, TERMS) == same
    assert digest(arrivals((1000, 5)), TERMS) != same
    assert digest(past, msgspec.structs.replace(TERMS, guess=1)) != same
    assert too_long(2000, R1) == 30_000


def test_the_example_of_the_readme() -> None:
    past = arrivals((1000, 10), prompt=1500)
    terms = msgspec.structs.replace(TERMS, prefill_tokens_per_s=15_000, ttft_ms=500)
    late = {n: dict(planned(past, msgspec.structs.replace(terms, guess=n)).candidates)[n] for n in (1, 2, 3)}
    assert late == {1: 5, 2: 1, 3: 0}
    floors = [planned(past, msgspec.structs.replace(terms, share=share)).replicas for share in (50, 90, 99)]
    assert floors == [1, 2, 3]


@pytest.mark.parametrize(("under_way", "replicas"), [(102, 2), (103, 3)])
def test_growth_within_the_floors_places_adds_no_replica(under_way: int, replicas: int) -> None:
    """All of them came within a minute. Two replicas have 128 places, of which 102 are four fifths."""
    demand = Demand(now_ns=NOW_NS, running=under_way, arrived_minute=200, active_at_ns=NOW_NS)
    ready = Replicas(wanted=2, ready=2, start_ns=60 * SECOND_NS)
    decision = decide(demand, ready, TEN, R1, Floor(replicas=2))
    assert (2 if decision is None else decision.to_replicas) == replicas
    without = decide(demand, ready, TEN, R1)
    assert without is not None
    assert without.to_replicas == 3
