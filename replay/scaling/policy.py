"""How many replicas a model shall have: pure, integers only; the same inputs always give the same decision.

What lives here: the policy. What must not: where its inputs come from (`demand.py`), clocks, the log.

In ten lines:

1. What is asked for has at least one replica at once; what nobody asks for keeps one until its idle time is
   over, then its minimum.
2. All replicas pull from one queue, so their slots are one pool: it must hold what is under way, waiting or
   running, and three standard deviations (a root of it), so a larger pool may be fuller.
3. Expected is what is under way, grown as in the last 30 or 60 s until a replica ordered now is ready, 60 s
   at most, and less where answers are short: those who come push no further than those who go.
4. More are wanted if the pool cannot hold that; but no more than serve what arrives and drain the rest in as
   long as a start takes, since who waits for a start is served late anyhow.
5. Prompts are filled one by one: they may keep a replica as busy as their wait stays in the TTFT target.
6. Fewer are wanted when nothing waits or starts, nothing was decided for two starts (60 s at least), the rest
   would hold the most of the last five minutes, and their work once it has come to rest there.
7. Tokens of a request are the last hour's mean; speed is the profile's, corrected by the last ten minutes.
8. Never more than the maximum, nor than the price ceiling pays for.
9. After three failed starts in a row only what is ready or starts is wanted; then one at a time is tried, 10,
   20, 40 s ... after the last that failed.
10. It says why, with the numbers.
"""

from math import isqrt

import msgspec

from events.contracts import SECOND_NS
from replay.scaling.demand import Demand, Replicas
from replay.scaling.hardware import Hardware, Natural, Positive

# The name that a decision carries: it changes with every change of what `decide` says.
POLICY = "pool-1"

# Standard deviations of what is under way that fit beside it: 99.9 % of a normal law's, its skew, and luck.
SPREAD = 3
# Growth is believed for no longer than it has been seen.
GROWTH_NS_MAX = 60 * SECOND_NS
# Between a decision and one for fewer lie two starts: what is given up costs one to get back, and its answers
# take about another to end. A fast start is no reason to hurry.
HELD_STARTS = 2
HELD_NS_MIN = 60 * SECOND_NS
# An answer's length until one has been seen: a chat's, a little long.
TOKENS_ASSUMED = 256
# Waits for prompts are M/D/1's: 99 % are shorter than 2.3 times prefill / (1 - busy). Busier than 70 % that
# formula is too hopeful; less busy than 20 % a replica is wasted on a target that long prompts miss anyhow.
WAIT_PERMILLE = 2300
BUSY_PERMILLE_MIN = 200
BUSY_PERMILLE_MAX = 700
# The observed speed is believed between half and double the profile's, and from so many tokens on.
SPEED_PERMILLE_MIN = 500
SPEED_PERMILLE_MAX = 2000
SPEED_TOKENS_MIN = 1000
# Failed starts in a row until no more than one is tried at a time, and how long after; doubled each time.
FAILED_MAX = 3
RETRY_NS = 10 * SECOND_NS
RETRY_NS_MAX = 600 * SECOND_NS


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the operator says of one model. `hour_nanousd_max` 0: no ceiling."""

    replicas_min: Natural = 0
    replicas_max: Natural = 8
    idle_ns: Natural = 300 * SECOND_NS
    ttft_ms: Positive = 2000
    hour_nanousd_max: Natural = 0


class Decision(msgspec.Struct, frozen=True):
    """From now on the model shall have `to_replicas`."""

    to_replicas: int
    reason: str


class _Need(msgspec.Struct, frozen=True):
    replicas: int
    why: str


class _Replica(msgspec.Struct, frozen=True):
    """What one replica holds and does, of requests as they were lately."""

    prompt_tokens: int
    output_tokens: int
    slots: int
    # The slots, and those that come free in half the TTFT target: the other half is margin.
    room: int
    # A decode step is step_ns + slope_ns x running.
    step_ns: int
    slope_ns: int
    # Tokens in a thousand seconds with all slots taken.
    tokens_per_ks: int


def decide(demand: Demand, replicas: Replicas, policy: Policy, hardware: Hardware) -> Decision | None:
    """Return how many replicas there shall be, and why; None leaves it as it was decided last."""
    low, high = bounds(policy, hardware)
    need = _idle(demand, replicas, policy) or _needed(demand, replicas, policy, hardware)
    if need.replicas > high:
        limit = f"the maximum is {high}"
        if high < policy.replicas_max:
            limit = f"the price ceiling pays for {high} at {hardware.hour_nanousd} nano-USD an hour"
        need = _Need(high, f"{need.why}; {limit}")
    elif need.replicas < low:
        need = _Need(low, f"{need.why}; the minimum is {low}")
    need = _after_failures(need, demand, replicas, low) or need
    return None if need.replicas == replicas.wanted else Decision(need.replicas, need.why)


def bounds(policy: Policy, hardware: Hardware) -> tuple[int, int]:
    """Return the fewest and the most replicas the policy allows; the price ceiling is above the minimum."""
    high = policy.replicas_max
    if policy.hour_nanousd_max and hardware.hour_nanousd:
        high = min(high, policy.hour_nanousd_max // hardware.hour_nanousd)
    return min(policy.replicas_min, high), high


def speed_permille(demand: Demand, replicas: Replicas, hardware: Hardware) -> int:
    """Return how long a decode step took lately, in permille of the profile's with as many running."""
    if demand.decode_tokens < SPEED_TOKENS_MIN or not replicas.running_sum:
        return 1000
    slope = hardware.step_us_per_running * replicas.running_square_sum // replicas.running_sum
    seen = demand.decode_ns // demand.decode_tokens // (hardware.step_us + slope)
    return max(SPEED_PERMILLE_MIN, min(SPEED_PERMILLE_MAX, seen))


def _idle(demand: Demand, replicas: Replicas, policy: Policy) -> _Need | None:
    """What to do while nothing is under way; None: there is."""
    if demand.waiting or demand.running:
        return None
    if not demand.active_at_ns:
        return _Need(0, "nothing was asked for")
    idle_ns = demand.now_ns - demand.active_at_ns
    why = f"nothing was under way for {idle_ns // SECOND_NS} s"
    if idle_ns >= policy.idle_ns:
        return _Need(0, why)
    if idle_ns >= _held_ns(replicas):
        return _Need(min(1, replicas.wanted), why)
    return _Need(replicas.wanted, why)


def _needed(demand: Demand, replicas: Replicas, policy: Policy, hardware: Hardware) -> _Need:
    one = _replica(demand, replicas, policy, hardware)
    more = _more(demand, replicas, one, hardware)
    prompts = _prompts(demand, policy, hardware, one)
    need = max(more, prompts, key=lambda need: need.replicas)
    if need.replicas >= replicas.wanted:
        return need
    held_ns = demand.now_ns - replicas.decided_at_ns
    if demand.waiting or replicas.starting or held_ns < _held_ns(replicas):
        return _Need(replicas.wanted, "fewer would do, but not for long enough yet")
    return _fewer(demand, replicas, one, need)


def _held_ns(replicas: Replicas) -> int:
    return max(HELD_NS_MIN, HELD_STARTS * replicas.start_ns)


def _replica(demand: Demand, replicas: Replicas, policy: Policy, hardware: Hardware) -> _Replica:
    prompt = output = TOKENS_ASSUMED
    if demand.ended:
        prompt = demand.prompt_tokens // demand.ended
        output = max(1, demand.output_tokens // demand.ended)
    permille = speed_permille(demand, replicas, hardware)
    slots = hardware.running_of(prompt + output)
    step_ns = hardware.step_us * permille
    slope_ns = hardware.step_us_per_running * permille
    tokens_per_ks = slots * 1_000_000_000_000 // (step_ns + slope_ns * slots)
    return _Replica(
        prompt_tokens=prompt,
        output_tokens=output,
        slots=slots,
        room=slots + tokens_per_ks * (policy.ttft_ms // 2) // output // 1_000_000,
        step_ns=step_ns,
        slope_ns=slope_ns,
        tokens_per_ks=tokens_per_ks,
    )


def _more(demand: Demand, replicas: Replicas, one: _Replica, hardware: Hardware) -> _Need:
    """As many as hold what is expected, or serve what arrives and drain the rest, whichever is fewer."""
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


def _growth(demand: Demand, replicas: Replicas, one: _Replica) -> int:
    """How many more will be under way once a replica that is ordered now is ready.

    With more running each is slower, but all together are faster: below full slots growth ends by itself, in
    about output x step^2 / step_ns.
    """
    under_way = demand.waiting + demand.running
    doubled = max(0, 2 * (under_way - demand.past[0]), under_way - demand.past[1])
    ahead_ns = min(replicas.start_ns, GROWTH_NS_MAX)
    if under_way < replicas.ready * one.slots:
        step_ns = one.step_ns + one.slope_ns * under_way // replicas.ready
        rest_ns = one.output_tokens * step_ns * step_ns // one.step_ns
        ahead_ns = ahead_ns * rest_ns // (ahead_ns + rest_ns)
    return doubled * ahead_ns // GROWTH_NS_MAX


def _prompts(demand: Demand, policy: Policy, hardware: Hardware, one: _Replica) -> _Need:
    """As many as fill the prompts that arrive without too long a wait for each other."""
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


def _fewer(demand: Demand, replicas: Replicas, one: _Replica, need: _Need) -> _Need:
    """The fewest, down to `need`, that would hold the most of the last minutes and the work of now at rest.

    Of r replicas with N under way each token takes step + slope x N / r. So N follows a negative binomial
    law, of shape r x step / slope + 1, and of load (tokens a second x slope) / r.
    """
    under_way = demand.waiting + demand.running
    most = max(under_way, *demand.past)
    live = max(1, replicas.ready + replicas.draining)
    slope_ns = max(1, one.slope_ns)
    # The work of now is the last minutes' at least: what a lull shows is too little.
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
    """After too many failed starts: what is ready, or one more once its time has come. None: go on."""
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
