"""The number of replicas of a model: pure, in integers; equal inputs always give an equal decision.

The policy reads no clock and no log: `demand.py` defines its inputs.

Rules 1 to 9 react to the present. The floor, which `floor.py` computes from the recent past, is the fewest
replicas in any case. The larger number counts, but the rules add none while the open requests take at most
four fifths of the floor's places.

The rules:

1. A model with open requests gets at least one replica at once. A model without requests keeps one until
   its idle time is over, and then falls to its minimum.
2. All replicas pull from one queue, so their slots form one pool. The pool must hold the open requests
   (waiting or running) and three standard deviations, which grow as the square root, so a larger pool may
   be fuller.
3. The expected load is the open requests plus their growth, at the rate of the last 30 or 60 s, until a
   replica ordered now is ready, but at most 60 s ahead. Short answers limit the growth, because requests
   soon leave.
4. Scale up if the pool cannot hold the expected load, but to no more than serve the arrivals and drain the
   rest in the time of one start: a request that waits for a start is late anyway.
5. Prompts are prefilled one by one. They may keep a replica busy only as far as their wait meets the TTFT
   target.
6. Scale down if nothing waits or starts, no decision was made for two starts (at least 60 s), and the
   smaller pool would hold the peak of the last five minutes and the current work at its equilibrium.
7. Tokens per request are the mean of the last hour. The speed is the profile's, corrected by the last ten
   minutes (half to double).
8. Never exceed the maximum or the price ceiling.
9. After three failed starts in a row, keep only the replicas that are ready or starting. Then try one more
   at a time, 10, 20, 40 s ... after the last failure, up to ten minutes.
10. Explain every decision with its numbers.
"""

from math import isqrt
from typing import Annotated

import msgspec

from events.contracts import SECOND_NS
from replay.scaling.demand import Demand, Replicas
from replay.scaling.hardware import Hardware, Natural, Positive

# Every decision carries this name. Change it whenever a decision or its reason changes, because `verify`
# makes decisions of this name again and compares them.
POLICY = "replay-2"

# Standard deviations of open requests to keep free: 99.9 % of a normal distribution, its skew, and a margin.
SPREAD = 3
# Do not extrapolate growth for longer than it was observed.
GROWTH_NS_MAX = 60 * SECOND_NS
# Wait two starts before scaling down: a removed replica costs one start to get back, and its answers take
# about another to end. HOLD_NS_MIN applies even if starts are fast.
HOLD_STARTS = 2
HOLD_NS_MIN = 60 * SECOND_NS
# While the open requests take no more than this part of the floor's places, their growth is taken for the
# noise that the replayed past had too.
CALM_PERMILLE = 800
# The length of an answer before any was seen: a rather long chat answer.
TOKENS_ASSUMED = 256
# Waits for prefill follow M/D/1: 99 % are shorter than 2.3 times prefill / (1 - busy). Above 70 % the formula
# is too optimistic. Below 20 % a replica is wasted on a target that long prompts miss anyway.
WAIT_PERMILLE = 2300
BUSY_PERMILLE_MIN = 200
BUSY_PERMILLE_MAX = 700
# Accept an observed speed between half and double the profile's, from this many tokens on.
SPEED_PERMILLE_MIN = 500
SPEED_PERMILLE_MAX = 2000
SPEED_TOKENS_MIN = 1000
# After this many failed starts in a row, try one at a time; the delay doubles each time.
FAILED_MAX = 3
RETRY_NS = 10 * SECOND_NS
RETRY_NS_MAX = 600 * SECOND_NS


Share = Annotated[int, msgspec.Meta(ge=0, le=100)]


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The operator's settings for one model. `hour_nanousd_max` 0: no ceiling."""

    replicas_min: Natural = 0
    replicas_max: Natural = 8
    idle_ns: Natural = 300 * SECOND_NS
    ttft_ms: Positive = 2000
    hour_nanousd_max: Natural = 0
    # Per cent of the requests that are to meet the target; 0: no floor.
    share: Share = 99
    # How long the floor holds without a request, if that is longer than `idle_ns`.
    warm_ns: Natural = 0


class Floor(msgspec.Struct, frozen=True):
    """The fewest replicas by the plans of the last minutes, and the fewest after a start from zero.

    `missed` is 1 if even the maximum misses the share. `plan` is the sequence of the plan that holds.
    """

    replicas: Natural = 0
    restart: Natural = 0
    missed: Natural = 0
    plan: Natural = 0


NO_FLOOR = Floor()


class Decision(msgspec.Struct, frozen=True):
    """Run `to_replicas` of the model from now on."""

    to_replicas: int
    reason: str


class _Need(msgspec.Struct, frozen=True):
    replicas: int
    why: str


class _Capacity(msgspec.Struct, frozen=True):
    """The capacity of one replica for requests like the recent ones."""

    prompt_tokens: int
    output_tokens: int
    slots: int
    # The slots, plus those that become free within half the TTFT target; the other half is margin.
    room: int
    # A decode step is step_ns + slope_ns x running.
    step_ns: int
    slope_ns: int
    # Tokens in a thousand seconds with all slots taken.
    tokens_per_ks: int


def decide(
    demand: Demand, replicas: Replicas, policy: Policy, hardware: Hardware, floor: Floor = NO_FLOOR
) -> Decision | None:
    """Return the number of replicas and the reason, or None to keep the latest decision."""
    low, high = bounds(policy, hardware)
    need = _wanted(demand, replicas, policy, hardware, floor)
    if need.replicas > high:
        limit = f"the maximum is {high}"
        if high < policy.replicas_max:
            limit = f"the price ceiling pays for {high} at {hardware.hour_nanousd} nano-USD an hour"
        need = _Need(high, f"{need.why}; {limit}")
    elif need.replicas < low:
        need = _Need(low, f"{need.why}; the minimum is {low}")
    need = _after_failures(need, demand, replicas, low) or need
    return None if need.replicas == replicas.wanted else Decision(need.replicas, need.why)


def limit(
    demand: Demand, replicas: Replicas, policy: Policy, hardware: Hardware, floor: Floor = NO_FLOOR
) -> str:
    """Return what keeps the model from as many replicas as its requests need, or ""."""
    low, high = bounds(policy, hardware)
    need = _wanted(demand, replicas, policy, hardware, floor)
    capped = _Need(min(need.replicas, high), need.why)
    if (after := _after_failures(capped, demand, replicas, low)) and after.replicas < capped.replicas:
        return after.why
    if need.replicas <= high and not floor.missed:
        return ""
    setting = "max" if high == policy.replicas_max else "hour_usd_max"
    return f"{setting} allows {_replicas(high)}; {need.why}"


def bounds(policy: Policy, hardware: Hardware) -> tuple[int, int]:
    """Return the fewest and the most replicas the policy allows; the price ceiling overrides the minimum."""
    high = policy.replicas_max
    if policy.hour_nanousd_max and hardware.hour_nanousd:
        high = min(high, policy.hour_nanousd_max // hardware.hour_nanousd)
    return min(policy.replicas_min, high), high


def speed_permille(demand: Demand, replicas: Replicas, hardware: Hardware) -> int:
    """Return the recent time of a decode step, in permille of the profile's at the same loads."""
    if demand.decode_tokens < SPEED_TOKENS_MIN or not replicas.tokens_per_ks_sum:
        return 1000
    # Nanoseconds per token in which the profile's replicas would have decoded under the reported loads.
    expected_ns = max(1, replicas.running_sum * 1000 * SECOND_NS // replicas.tokens_per_ks_sum)
    seen = demand.decode_ns * 1000 // (demand.decode_tokens * expected_ns)
    return max(SPEED_PERMILLE_MIN, min(SPEED_PERMILLE_MAX, seen))


def _wanted(demand: Demand, replicas: Replicas, policy: Policy, hardware: Hardware, floor: Floor) -> _Need:
    """Return the need before any limit."""
    need = _idle(demand, replicas, policy) or _needed(demand, replicas, policy, hardware)
    under_way = demand.waiting + demand.running
    is_silent = not under_way and demand.now_ns - demand.active_at_ns >= max(policy.idle_ns, policy.warm_ns)
    least = floor.replicas if replicas.ready or not under_way else max(floor.replicas, floor.restart)
    if is_silent:
        return need
    kept = max(least, replicas.wanted)
    if floor.replicas and need.replicas > kept:
        places = floor.replicas * _capacity(demand, replicas, policy, hardware).slots
        if under_way * 1000 <= places * CALM_PERMILLE:
            return _Need(kept, f"{under_way} under way, and the floor has {places} places")
    if least <= need.replicas:
        return need
    share = f"{'fewer than ' if floor.missed else ''}{policy.share} %"
    return _Need(
        least, f"{_replicas(least)} would have served {share} of the recent past in time; {need.why}"
    )


def _idle(demand: Demand, replicas: Replicas, policy: Policy) -> _Need | None:
    """Return the need of a model without open requests, or None if it has some."""
    if demand.waiting or demand.running:
        return None
    if not demand.active_at_ns:
        return _Need(0, "nothing was asked for")
    idle_ns = demand.now_ns - demand.active_at_ns
    why = f"nothing was under way for {idle_ns // SECOND_NS} s"
    if idle_ns >= policy.idle_ns:
        return _Need(0, why)
    if idle_ns >= _hold_ns(replicas):
        return _Need(min(1, replicas.wanted), why)
    return _Need(replicas.wanted, why)


def _needed(demand: Demand, replicas: Replicas, policy: Policy, hardware: Hardware) -> _Need:
    one = _capacity(demand, replicas, policy, hardware)
    more = _more(demand, replicas, one, hardware)
    prompts = _prompts(demand, policy, hardware, one)
    need = max(more, prompts, key=lambda need: need.replicas)
    if need.replicas >= replicas.wanted:
        return need
    since_decision_ns = demand.now_ns - replicas.decided_at_ns
    if demand.waiting or replicas.starting or since_decision_ns < _hold_ns(replicas):
        return _Need(replicas.wanted, "fewer would do, but not for long enough yet")
    return _fewer(demand, replicas, one, need)


def _hold_ns(replicas: Replicas) -> int:
    return max(HOLD_NS_MIN, HOLD_STARTS * replicas.start_ns)


def _capacity(demand: Demand, replicas: Replicas, policy: Policy, hardware: Hardware) -> _Capacity:
    prompt = output = TOKENS_ASSUMED
    if demand.ended:
        prompt = demand.prompt_tokens // demand.ended
        output = max(1, demand.output_tokens // demand.ended)
    permille = speed_permille(demand, replicas, hardware)
    slots = hardware.running_of(prompt + output)
    step_ns = hardware.step_us * permille
    slope_ns = hardware.step_us_per_running * permille
    tokens_per_ks = slots * 1_000_000_000_000 // (step_ns + slope_ns * slots)
    return _Capacity(
        prompt_tokens=prompt,
        output_tokens=output,
        slots=slots,
        room=slots + tokens_per_ks * (policy.ttft_ms // 2) // output // 1_000_000,
        step_ns=step_ns,
        slope_ns=slope_ns,
        tokens_per_ks=tokens_per_ks,
    )


def _more(demand: Demand, replicas: Replicas, one: _Capacity, hardware: Hardware) -> _Need:
    """Return the fewer of two: replicas that hold the expected load, and replicas that serve and drain it."""
    under_way = demand.waiting + demand.running
    expected = under_way + _growth(demand, replicas, one)
    holding = _up(expected + _spread(under_way), one.room)
    arriving = demand.arrived_minute * one.output_tokens * 1000 // 60
    drained = expected * one.output_tokens * 1000 * SECOND_NS // max(SECOND_NS, replicas.start_ns)
    serving = _up(arriving + drained, one.tokens_per_ks)
    found = max(1, min(holding, serving))
    why = f"{demand.waiting} waiting and {demand.running} running, {expected} expected: "
    if serving < holding:
        why += f"{_replicas(found)} of {one.tokens_per_ks // 1000} tokens/s serve and drain them"
    else:
        why += f"{_replicas(found)} of {one.slots} hold them"
    return _Need(found, f"{why}; {replicas.ready} ready, {replicas.starting} starting")


def _growth(demand: Demand, replicas: Replicas, one: _Capacity) -> int:
    """Return the growth of open requests until a replica that is ordered now is ready.

    With more running requests each one is slower, but their total rate is higher. Below full slots the growth
    therefore ends, after about output x step^2 / step_ns.
    """
    under_way = demand.waiting + demand.running
    doubled = max(0, 2 * (under_way - demand.past[0]), under_way - demand.past[1])
    ahead_ns = min(replicas.start_ns, GROWTH_NS_MAX)
    if under_way < replicas.ready * one.slots:
        step_ns = one.step_ns + one.slope_ns * under_way // replicas.ready
        rest_ns = one.output_tokens * step_ns * step_ns // one.step_ns
        ahead_ns = ahead_ns * rest_ns // (ahead_ns + rest_ns)
    return doubled * ahead_ns // GROWTH_NS_MAX


def _prompts(demand: Demand, policy: Policy, hardware: Hardware, one: _Capacity) -> _Need:
    """Return the replicas that prefill the arriving prompts within the target."""
    prefill_ms = one.prompt_tokens * 1000 // hardware.prefill_tokens_per_s
    busy_permille = BUSY_PERMILLE_MAX
    if prefill_ms < policy.ttft_ms:
        wait = WAIT_PERMILLE * prefill_ms // (policy.ttft_ms - prefill_ms)
        busy_permille = max(BUSY_PERMILLE_MIN, min(BUSY_PERMILLE_MAX, 1000 - wait))
    arriving = demand.arrived_minute * one.prompt_tokens * 1000 // 60
    found = _up(arriving, hardware.prefill_tokens_per_s * busy_permille)
    return _Need(
        found, f"{arriving // 1000} prompt tokens/s keep {_replicas(found)} busy for {busy_permille} permille"
    )


def _fewer(demand: Demand, replicas: Replicas, one: _Capacity, need: _Need) -> _Need:
    """Return the fewest replicas, at least `need`, that would hold the recent peak and the current work.

    With N requests on r replicas, each token takes step + slope x N / r. In equilibrium N follows a negative
    binomial distribution of shape r x step / slope + 1 and of load (tokens per second x slope) / r.
    """
    under_way = demand.waiting + demand.running
    most = max(under_way, *demand.past)
    live = max(1, replicas.ready + replicas.draining)
    slope_ns = max(1, one.slope_ns)
    # The current work is at least the mean of the last minutes, because a lull shows too little.
    usual = max(demand.running, sum(demand.past) // len(demand.past))
    load_ppm = usual * slope_ns * 1_000_000 // (one.step_ns + slope_ns * usual // live)
    found = max(need.replicas, _up(most + _spread(under_way), one.room))
    while found < replicas.wanted:
        rest_ppm = 1_000_000 - load_ppm // found
        if rest_ppm > 0:
            mean = (one.step_ns * found // slope_ns + 1) * (load_ppm // found) // rest_ppm
            if mean + _spread(mean * 1_000_000 // rest_ppm) <= found * one.room:
                break
        found += 1
    return _Need(
        min(found, replicas.wanted),
        f"{under_way} under way, {most} at most in five minutes: {_replicas(found)} of {one.slots} hold them",
    )


def _after_failures(need: _Need, demand: Demand, replicas: Replicas, low: int) -> _Need | None:
    """Return the need after too many failed starts in a row, or None if there were fewer."""
    under_way = replicas.ready + replicas.starting
    if replicas.failed < FAILED_MAX or need.replicas <= under_way:
        return None
    doubled = min(replicas.failed - FAILED_MAX, 16)
    retry_at_ns = replicas.failed_at_ns + min(RETRY_NS << doubled, RETRY_NS_MAX)
    failed = f"{replicas.failed} starts failed in a row"
    if demand.now_ns < retry_at_ns:
        left = max(low, under_way)
        return _Need(left, f"{failed}; the next is tried in {(retry_at_ns - demand.now_ns) // SECOND_NS} s")
    more = under_way if replicas.starting else under_way + 1
    return _Need(max(low, more), f"{failed}; one at a time is tried: {need.why}")


def _spread(variance: int) -> int:
    return isqrt(SPREAD * SPREAD * variance)


def _up(count: int, size: int) -> int:
    return -(-count // size)


def _replicas(count: int) -> str:
    return f"{count} replica" if count == 1 else f"{count} replicas"
