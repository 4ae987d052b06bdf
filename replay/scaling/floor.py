"""The floor under the number of replicas: a replay of the recent arrivals, pure and in integers.

`planned` asks how many replicas the recent past would have needed, so that `share` per cent of its requests
got their first token within `ttft_ms`. `policy.decide` takes the answer as an input, and its other rules
react to the present.

Arrivals are kept in slots of SLOT_NS. For a number of replicas, two integers run along the slots: the prompts
that are not filled yet, and the output tokens that are not made yet. The fleet is one pool: work spreads
evenly, prompts are filled at the profile's rate, and a decode step takes as long as the load at that moment
makes it. The requests of a slot are late if the prompts before them, and the wait for a place once all places
are taken, exceed the target.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from events.contracts import SECOND_NS
from events.fleet import Planned
from replay.scaling.arrivals import SLOT_NS, Arrivals, Slot
from replay.scaling.demand import Demand, Replicas
from replay.scaling.hardware import Hardware
from replay.scaling.policy import NO_FLOOR, TOKENS_ASSUMED, Floor, Policy, bounds, speed_permille

SLOT_US = SLOT_NS // 1000
# A young log has not seen its bursts yet: its replicas count as YOUNG_PERMILLE slower at first, falling to
# nothing once it is YOUNG_NS old.
YOUNG_NS = 1200 * SECOND_NS
YOUNG_PERMILLE = 500
# If even the maximum misses the share, accept this many per 1,000 requests less than it serves in time.
SLACK_PERMILLE = 5
# Silences are skipped in steps of at most this many slots: the load hardly changes within two seconds.
STRIDE = 8


# The past is replayed this often, and the highest floor of the last HOLD_NS holds.
PLAN_NS = 30 * SECOND_NS
HOLD_NS = 300 * SECOND_NS


class FloorTerms(msgspec.Struct, frozen=True):
    """What the arrivals are replayed against: the settings, the profile, and the fleet's recent speed.

    `low` and `high` bound the replicas, and the search begins at `guess`. A silence of `idle_ns` ends with a
    start of `start_ns`, if `low` is 0. A decode step takes `speed_permille` of the profile's time.
    """

    share: int
    ttft_ms: int
    low: int
    high: int
    guess: int
    idle_ns: int
    start_ns: int
    speed_permille: int
    running_max: int
    kv_tokens: int
    prefill_tokens_per_s: int
    step_us: int
    step_us_per_running: int

    @property
    def hardware(self) -> Hardware:
        """Return the profile without its costs."""
        return Hardware(
            gpus=0,
            running_max=self.running_max,
            kv_tokens=self.kv_tokens,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            step_us=self.step_us,
            step_us_per_running=self.step_us_per_running,
            start_ms=0,
            gpu_hour_nanousd=0,
            source="",
        )


class Plan(msgspec.Struct, frozen=True):
    """The fewest `replicas` that serve the past, 0 without requests; `restart` also serves what gathers while
    a fleet at zero starts.

    `counted` requests were replayed for the share; `candidates` and `restarts` hold how many of them each
    number tried would have served late, where the replay of a number that is too small ends early.
    `is_missed` says that the maximum misses the share too.
    """

    replicas: int = 0
    restart: int = 0
    counted: int = 0
    candidates: tuple[tuple[int, int], ...] = ()
    restarts: tuple[tuple[int, int], ...] = ()
    is_missed: bool = False


# A slot as work: slots with replicas since the last one; requests that count; prefill of all and of one, in
# microseconds of a replica; output in thousandths of a token. A plain tuple, because a plan makes thousands.
_Load = tuple[int, int, int, int, int]


class _Found(NamedTuple):
    replicas: int
    tried: tuple[tuple[int, int], ...]
    is_missed: bool


class _Past(NamedTuple):
    loads: Sequence[_Load]
    counted: int
    ttft_us: int
    # Places of a replica; mean output tokens; mean output tokens left of a running answer.
    places: int
    output: int
    residual: int
    step_ns: int
    slope_ns: int


def held(plans: Sequence[Planned], now_ns: int) -> Floor:
    """Return the floor of these plans, the model's last ones in order: the highest of the last HOLD_NS."""
    ends = [*(plan.at_ns for plan in plans[1:]), now_ns]
    recent = [plan for plan, end in zip(plans, ends, strict=False) if end > now_ns - HOLD_NS]
    if not recent:
        return NO_FLOOR
    highest = max(recent, key=lambda plan: plan.floor)
    return Floor(
        replicas=highest.floor,
        restart=max(plan.restart for plan in recent),
        missed=int(highest.is_missed),
        plan=highest.sequence,
    )


def is_new(plan: Plan, plans: Sequence[Planned], policy: str) -> bool:
    """Return whether a plan differs from the last stored one; without one, it does if it has a floor."""
    if not plans:
        return plan.replicas > 0
    last = plans[-1]
    return (plan.replicas, plan.restart, plan.is_missed, policy) != (
        last.floor,
        last.restart,
        last.is_missed,
        last.policy,
    )


def has_floor(policy: Policy, hardware: Hardware) -> bool:
    """Return whether a floor can make a difference. One replica stays for `idle_ns` without it."""
    low, high = bounds(policy, hardware)
    return policy.share > 0 and high > low and (high > 1 or policy.warm_ns > policy.idle_ns)


def too_long(ttft_ms: int, hardware: Hardware) -> int:
    """Return the tokens above which a prompt misses the target by itself."""
    return ttft_ms * hardware.prefill_tokens_per_s // 1000


def terms_of(
    demand: Demand, replicas: Replicas, policy: Policy, hardware: Hardware, plans: Sequence[Planned]
) -> FloorTerms:
    low, high = bounds(policy, hardware)
    return FloorTerms(
        share=policy.share,
        ttft_ms=policy.ttft_ms,
        low=low,
        high=high,
        guess=plans[-1].floor if plans else 0,
        idle_ns=max(policy.idle_ns, policy.warm_ns),
        start_ns=replicas.start_ns,
        speed_permille=speed_permille(demand, replicas, hardware),
        running_max=hardware.running_max,
        kv_tokens=hardware.kv_tokens,
        prefill_tokens_per_s=hardware.prefill_tokens_per_s,
        step_us=hardware.step_us,
        step_us_per_running=hardware.step_us_per_running,
    )


def planned(arrivals: Arrivals, terms: FloorTerms) -> Plan:
    """Return the floor, within the bounds of `terms`."""
    if not arrivals.slots or not terms.share or not terms.high:
        return Plan()
    past = _past(arrivals, terms)
    steady = _search(past.loads, past, terms, guess=terms.guess)
    restart = steady
    if behind := _behind_starts(past.loads, arrivals.slots, terms):
        restart = _search(behind, past, terms, guess=steady.replicas)
    return Plan(
        replicas=steady.replicas,
        restart=max(steady.replicas, restart.replicas),
        counted=past.counted,
        candidates=steady.tried,
        restarts=restart.tried if restart is not steady else (),
        is_missed=steady.is_missed,
    )


def _search(loads: Sequence[_Load], past: _Past, terms: FloorTerms, *, guess: int) -> _Found:
    total = sum([load[1] for load in loads])
    allowed = total * (100 - terms.share) // 100
    tried: dict[int, int] = {}

    def suffices(replicas: int) -> bool:
        if replicas not in tried:
            tried[replicas] = _late(loads, past, replicas, allowed)
        return tried[replicas] <= allowed

    found = _fewest(suffices, max(1, min(guess, terms.high)), terms.high)
    is_missed = found > terms.high
    if is_missed:
        tried.clear()
        reached = _late(loads, past, terms.high, total)
        allowed = reached + total * SLACK_PERMILLE // 1000
        found = _fewest(suffices, terms.high, terms.high)
    return _Found(found, tuple(sorted(tried.items())), is_missed)


def digest(arrivals: Arrivals, terms: FloorTerms) -> str:
    """Return the SHA-256 of everything that a plan depends on."""
    return hashlib.sha256(msgspec.json.encode([arrivals, terms])).hexdigest()


def _fewest(suffices: Callable[[int], bool], guess: int, high: int) -> int:
    """Return the fewest replicas that suffice, `high` + 1 if none do; steps double away from the guess."""
    step = 1
    low, found = 0, high + 1
    at = guess
    while low + 1 < found:
        if suffices(at):
            found = at
            at = max(low + 1, at - step) if low == 0 else (low + found) // 2
        else:
            low = at
            at = min(high, at + step) if found > high else (low + found) // 2
        step *= 2
    return found


def _behind_starts(loads: Sequence[_Load], slots: Sequence[Slot], terms: FloorTerms) -> list[_Load]:
    """Return the loads of a fleet that goes to zero in each silence, so that what arrives during a start
    gathers. Only the requests of the time of one more start count. Without a silence, return nothing."""
    idle = terms.idle_ns // SLOT_NS
    if terms.low or max(loads)[0] < idle:
        return []
    start = -(-terms.start_ns // SLOT_NS)
    behind: list[_Load] = []
    before = slots[0].at
    ready = -start
    for (gap, counted, prompt_us, own_us, millitokens), slot in zip(loads, slots, strict=True):
        at = slot[0]
        away = min(ready, at) - before if ready > before else 0
        if gap >= idle:
            ready = at + start
        if at >= ready + start:
            counted = 0
        behind.append((gap - away, counted, prompt_us, own_us, millitokens))
        before = at
    return behind


def _past(arrivals: Arrivals, terms: FloorTerms) -> _Past:
    slots = arrivals.slots
    _, _, ended, prompt_tokens, output_tokens, output_squares, _ = map(sum, zip(*slots, strict=True))
    prompt = output = residual = TOKENS_ASSUMED
    if ended:
        prompt = prompt_tokens // ended
        output = max(1, output_tokens // ended)
        residual = max(1, output_squares // (2 * output * ended))
    age_ns = max(0, min(YOUNG_NS, arrivals.now_ns - arrivals.oldest * SLOT_NS))
    permille = 1000 + YOUNG_PERMILLE * (YOUNG_NS - age_ns) // YOUNG_NS
    us, per_s = 1000 * permille, terms.prefill_tokens_per_s
    loads: list[_Load] = []
    before = slots[0].at
    idle = terms.idle_ns // SLOT_NS
    start = -(-terms.start_ns // SLOT_NS)
    until = total = 0
    for at, requests, answered, prompt_tokens, output_tokens, _, long in slots:
        gap = at - before
        if gap >= idle:
            until = at + start
        counted = 0 if at < until else requests - long
        if unknown := requests - answered:
            prompt_tokens += unknown * prompt
            output_tokens += unknown * output
        prompt_us = prompt_tokens * us // per_s
        total += counted
        # A counted prompt fits the target, which the distrust of a young log must not hide.
        own_us = min(prompt_us // requests, terms.ttft_ms * 1000)
        loads.append((gap, counted, prompt_us, own_us, output_tokens * 1000))
        before = at
    return _Past(
        loads,
        total,
        terms.ttft_ms * 1000,
        terms.hardware.running_of(prompt + output),
        output,
        residual,
        terms.step_us * terms.speed_permille * permille // 1000,
        terms.step_us_per_running * terms.speed_permille * permille // 1000,
    )


def _late(loads: Sequence[_Load], past: _Past, replicas: int, allowed: int) -> int:
    """Return how many requests are late; once they are more than allowed, the count stops."""
    _, _, ttft_us, places, output, residual, step_ns, slope_ns = past
    fill_us = replicas * SLOT_US
    most = replicas * places * 1000
    full = (most + 1) * residual
    share_ns = 1000 * replicas
    # The time of a place until it is free again, in microseconds times replicas x places.
    turn_us = output * (step_ns + slope_ns * places) // 1000
    prompts_us = millitokens = late = 0
    for gap, counted, prompt_us, own_us, arriving in loads:
        prompts_us -= fill_us * gap
        if prompts_us < 0:
            prompts_us = 0
        while gap > 0 and millitokens:
            running = millitokens // residual
            if running > most:
                running = most
            stride = gap if gap < STRIDE else STRIDE
            made = running * stride * SLOT_NS // (step_ns + slope_ns * running // share_ns)
            millitokens = millitokens - made if 0 < made < millitokens else 0
            gap -= stride
        # Prompts that one replica fills within the target are in time, if there is a place.
        if counted and (prompts_us + prompt_us > ttft_us or millitokens >= full):
            room_us = ttft_us - own_us - prompts_us // replicas
            if millitokens >= full:
                room_us -= (millitokens // residual - most) * turn_us // most
            if room_us < 0:
                late += counted
            elif own_us and (behind := counted - room_us * replicas // own_us - 1) > 0:
                late += behind
            if late > allowed:
                return late
        prompts_us += prompt_us
        millitokens += arriving
    return late
