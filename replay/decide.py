"""How many replicas a model shall have: pure, integers only; the same inputs always give the same decision.

What lives here: the policy. What must not: where its inputs come from (`demand.py`), clocks, the log.

In ten lines:

1. A model with nothing under way for its idle time goes to its minimum; one that is asked for has at least
   one replica.
2. All replicas pull from one queue, so their slots are one pool. Offered work is arrivals x mean output.
3. It needs the fewest replicas whose slots hold the mean concurrency of that work and 2.5 standard
   deviations, and whose prefill is at most 70 % busy.
4. Arrivals are the highest of the last 5 minutes' and of those in the last 60 and 15 s that are no chance:
   k less two of its standard deviations. So a burst counts at once, and the slow curve is followed.
5. What is under way needs as many as hold it all, or as drain it in the time that a start takes.
6. More replicas are wanted at once; fewer when nothing waits or starts and the last decision is as long ago
   as a start takes, 60 s at least.
7. How fast a replica is comes from the profile, corrected by the last 10 minutes: half to double.
8. Never more than the maximum, and than the price ceiling pays.
9. After three failed starts in a row only what is ready is wanted; one more is tried after 10, 20, 40 s ...
10. It says why, with the numbers.
"""

from math import isqrt

import msgspec

from replay.demand import BURST_NS, CURVE_NS, MINUTE_NS, SECOND_NS, Demand, Replicas
from replay.hardware import Hardware

# The name that a decision carries: it changes with every change of what `decide` says.
POLICY = "pool-1"

# Standard deviations of concurrency that fit beside its mean: 99 % of a normal law's, and some for its skew.
SPREAD_PERMILLE = 2500
# Standard deviations by which a short window's arrivals may be chance.
CHANCE = 2
# Prompts wait for each other one by one: above this share of the time that wait grows without measure.
PREFILL_PERMILLE = 700
# An answer's length until one has been seen: a chat's, a little long.
OUTPUT_TOKENS_ASSUMED = 256
# The least time between a decision and one for fewer, however fast a start is.
HELD_NS = 60 * SECOND_NS
# The observed speed is believed between half and double the profile's, and from so many tokens on.
SPEED_PERMILLE_MIN, SPEED_PERMILLE_MAX, SPEED_TOKENS_MIN = 500, 2000, 1000
# Failed starts in a row until no more than one is tried at a time, and how long after; doubled each time.
FAILED_MAX, RETRY_NS, RETRY_NS_MAX = 3, 10 * SECOND_NS, 600 * SECOND_NS


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the operator says of one model. `hour_nanousd_max` 0: no ceiling."""

    replicas_min: int = 0
    replicas_max: int = 8
    idle_ns: int = 300 * SECOND_NS
    ttft_ms: int = 2000
    hour_nanousd_max: int = 0


class Decision(msgspec.Struct, frozen=True):
    """From now on the model shall have `to_replicas`."""

    to_replicas: int
    reason: str


class _Need(msgspec.Struct, frozen=True):
    replicas: int
    why: str


def decide(demand: Demand, replicas: Replicas, policy: Policy, hardware: Hardware) -> Decision | None:
    """Return how many replicas there shall be, and why; None leaves it as it was decided last."""
    low, high = bounds(policy, hardware)
    wanted = replicas.wanted
    need = _limited(_needed(demand, replicas, policy, hardware), low, high, policy, hardware)
    if (retreat := _after_failures(need, demand, replicas, low)) is not None:
        return None if retreat.replicas == wanted else Decision(retreat.replicas, retreat.why)
    if need.replicas > wanted:
        return Decision(need.replicas, need.why)
    if need.replicas < wanted and (wanted > high or _may_shrink(need, demand, replicas, low)):
        return Decision(need.replicas, need.why)
    return None


def bounds(policy: Policy, hardware: Hardware) -> tuple[int, int]:
    """Return the fewest and the most replicas the policy allows; the price ceiling is above the minimum."""
    high = policy.replicas_max
    if policy.hour_nanousd_max and hardware.hour_nanousd:
        high = min(high, policy.hour_nanousd_max // hardware.hour_nanousd)
    return min(policy.replicas_min, high), high


def _limited(need: _Need, low: int, high: int, policy: Policy, hardware: Hardware) -> _Need:
    if need.replicas > high:
        limit = f"the maximum is {high}"
        if high < policy.replicas_max:
            limit = f"the price ceiling pays {high} at {hardware.hour_nanousd} nano-USD an hour"
        return _Need(high, f"{need.why}; {limit}")
    if need.replicas < low:
        return _Need(low, f"{need.why}; the minimum is {low}")
    return need


def _needed(demand: Demand, replicas: Replicas, policy: Policy, hardware: Hardware) -> _Need:
    under_way = demand.waiting + demand.running
    if not under_way:
        idle_ns = demand.now_ns - demand.active_at_ns
        if not demand.active_at_ns or idle_ns >= policy.idle_ns:
            return _Need(0, f"nothing has been under way for {idle_ns // SECOND_NS} s")
        if not replicas.wanted:
            return _Need(0, "nothing is under way")
    flow = _flow(demand, policy, hardware, speed_permille(demand, replicas, hardware))
    backlog = _backlog(demand, replicas, hardware)
    return max(flow, backlog, key=lambda need: need.replicas)


def speed_permille(demand: Demand, replicas: Replicas, hardware: Hardware) -> int:
    """Return how long a decode step took lately, in permille of the profile's at the same concurrency."""
    if demand.decode_tokens < SPEED_TOKENS_MIN or not replicas.running_sum:
        return 1000
    expected_us = hardware.step_us_at(1) + hardware.step_us_per_running * (
        replicas.running_square_sum - replicas.running_sum
    ) // max(1, replicas.running_sum)
    seen = demand.decode_ns // demand.decode_tokens // expected_us
    return max(SPEED_PERMILLE_MIN, min(SPEED_PERMILLE_MAX, seen))


def _tokens(demand: Demand) -> tuple[int, int]:
    """Return the mean prompt and output tokens of a request."""
    if not demand.ended:
        return OUTPUT_TOKENS_ASSUMED, OUTPUT_TOKENS_ASSUMED
    return demand.prompt_tokens // demand.ended, max(1, demand.output_tokens // demand.ended)


def _arrivals_per_ks(demand: Demand) -> int:
    """Return the arrivals in a thousand seconds."""
    rates = [demand.arrived_curve * 1000 * SECOND_NS // CURVE_NS]
    for arrived, window_ns in ((demand.arrived_minute, MINUTE_NS), (demand.arrived_burst, BURST_NS)):
        sure = arrived - CHANCE * isqrt(arrived)
        rates.append(max(0, sure) * 1000 * SECOND_NS // window_ns)
    return max(rates)


def _flow(demand: Demand, policy: Policy, hardware: Hardware, permille: int) -> _Need:
    """The fewest replicas that hold what arrives, once it has come to rest.

    Of r replicas with N under way each token takes step + step_per_running x N / r. So N follows a negative
    binomial law of shape r x step / step_per_running + 1 and load (tokens/s x step_per_running) / r.
    """
    arrivals = _arrivals_per_ks(demand)
    prompt, output = _tokens(demand)
    step_us = hardware.step_us * permille // 1000
    slope_us = max(1, hardware.step_us_per_running * permille // 1000)
    slots = hardware.running_of(prompt + output)
    # Arrivals in 1000 s x tokens x us are parts of a billion.
    load_ppm = arrivals * output * slope_us // 1000
    prefill = -(-arrivals * prompt // (hardware.prefill_tokens_per_s * PREFILL_PERMILLE))
    # Those who come while the target passes find the slots that have come free by then.
    freed = slots * policy.ttft_ms * 1000 // ((step_us + slope_us * slots) * output)
    replicas = max(1, prefill, load_ppm // 1_000_000 + 1)
    while True:
        rest_ppm = 1_000_000 - load_ppm // replicas
        shape = 1000 * step_us * replicas // slope_us + 1000
        mean = shape * (load_ppm // replicas) // rest_ppm
        spread = isqrt(mean * 1_000_000 // rest_ppm * 1000) * SPREAD_PERMILLE // 1000
        if mean + spread <= replicas * (slots + freed) * 1000:
            break
        replicas += 1
    return _Need(
        replicas,
        f"{arrivals * 60 // 1000} requests a minute of {prompt} + {output} tokens keep {mean // 1000} "
        f"running, {spread // 1000} more at times: {_slots(replicas, slots)}",
    )


def _backlog(demand: Demand, replicas: Replicas, hardware: Hardware) -> _Need:
    """The replicas that hold all that is under way, or drain it in as long as a start takes, the fewer."""
    under_way = demand.waiting + demand.running
    prompt, output = _tokens(demand)
    slots = hardware.running_of(prompt + output)
    holding = -(-under_way // slots)
    drained = replicas.start_ns // 1000 * slots // hardware.step_us_at(slots)
    draining = -(-under_way * output // max(1, drained))
    found = max(1, min(holding, draining))
    return _Need(
        found,
        f"{demand.waiting} waiting and {demand.running} running need {_slots(found, slots)}; "
        f"{replicas.ready} ready, {replicas.starting} starting",
    )


def _slots(replicas: int, slots: int) -> str:
    return f"{replicas} {'replica' if replicas == 1 else 'replicas'} of {slots}"


def _may_shrink(need: _Need, demand: Demand, replicas: Replicas, low: int) -> bool:
    """What is given up costs a start to get back, so it is kept for as long as a start takes."""
    held_ns = demand.now_ns - replicas.decided_at_ns
    idle = need.replicas == low and not (demand.waiting or demand.running)
    return idle or (
        held_ns >= max(HELD_NS, replicas.start_ns) and not demand.waiting and not replicas.starting
    )


def _after_failures(need: _Need, demand: Demand, replicas: Replicas, low: int) -> _Need | None:
    """After too many failed starts: what is ready, or one more once its time has come. None: go on."""
    if replicas.failed < FAILED_MAX or need.replicas <= replicas.ready:
        return None
    doubled = min(replicas.failed - FAILED_MAX, 16)
    retry_at_ns = replicas.failed_at_ns + min(RETRY_NS << doubled, RETRY_NS_MAX)
    failed = f"{replicas.failed} starts failed in a row"
    if demand.now_ns < retry_at_ns:
        left = max(low, replicas.ready)
        return _Need(left, f"{failed}; the next is tried in {(retry_at_ns - demand.now_ns) // SECOND_NS} s")
    return _Need(max(low, replicas.ready + 1), f"{failed}; one more is tried: {need.why}")
