"""The policy that knows the future: the reference for all others.

It knows every request's time and tokens in advance and derives a schedule from them. Its cold starts take as
long as those of other policies, and no replica exists before the trace begins.

First, a fleet with instant starts serves the trace, with enough replicas at each moment for the open requests
and a margin. This gives the number of replicas needed over time. Then each of these replicas is ordered one
cold start ahead. A replica is kept over a gap that is shorter than draining and starting again.

Margins are tried in rising order, until a schedule with real cold starts serves 99 % of the requests in time.
The cheapest schedule that does so is returned. If none does, it is the cheapest of those that serve the most.
A schedule ignores how requests are spread over replicas, so if requests wait nevertheless, more replicas are
started. A better schedule outside this family may exist.
"""

from collections.abc import Callable, Sequence

from replay.backtest.simulator import SimulatedFleet, TraceRequest
from replay.scaling.demand import Demands
from replay.scaling.hardware import MISSED_SHARE, Hardware

TICK_S = 1.0
# The share of slots that is kept free.
MARGINS = (0.0, 0.1, 0.2, 0.3, 0.45)
# The time that a replica takes to drain, in mean answer times: a few answers are very long.
ENDING_ANSWERS = (4.0, 8.0)
# Schedules within this share of each other count as equal, and the cheaper one wins.
EQUAL_SHARE = 0.0005


class _AtOnce:
    """Enough replicas for the open requests, for a fleet with instant starts."""

    tick_s = TICK_S
    demands: Demands | None = None

    def __init__(self, slots: float) -> None:
        self._slots = slots
        self.needed: list[tuple[float, int]] = []

    def decide(self, now_s: float, fleet: SimulatedFleet) -> int | None:
        wanted = -int(-fleet.concurrency.under_way // self._slots)
        self.needed.append((now_s, wanted))
        return wanted


class Oracle:
    """Follows a schedule of replicas by time, and adds enough places for the open requests."""

    tick_s = TICK_S
    demands: Demands | None = None

    def __init__(self, schedule: Sequence[tuple[float, int]], *, slots: int) -> None:
        self._schedule = schedule
        self._slots = slots
        self._next = 0
        self._wanted = 0

    def decide(self, now_s: float, fleet: SimulatedFleet) -> int | None:
        while self._next < len(self._schedule) and self._schedule[self._next][0] <= now_s:
            self._wanted = self._schedule[self._next][1]
            self._next += 1
        # Requests that wait for prompts before them, and not for a place, need no replica.
        return max(self._wanted, -(-fleet.concurrency.under_way // self._slots))


def best(
    asked: Sequence[TraceRequest],
    hardware: Hardware,
    *,
    start_s: float,
    ttft_ms: int,
    after_s: float = 0.0,
    progress: Callable[[float], None] | None = None,
) -> SimulatedFleet:
    """Return the fleet of the best schedule after its run; `progress` is called for each trial.

    The cost is measured after `after_s`."""
    count = len(asked)
    output = sum(one.output_tokens for one in asked) / count
    prompt = sum(one.prompt_tokens for one in asked) / count
    slots = hardware.running_of(int(prompt + output))
    answer_s = output * hardware.step_us_at(slots) / 1e6
    tried: list[tuple[float, SimulatedFleet]] = []
    for margin in MARGINS:
        needed = _needed(asked, hardware, slots=slots * (1 - margin))
        for answers in ENDING_ANSWERS:
            plan = _schedule(needed, start_s=start_s, gap_s=start_s + answers * answer_s)
            fleet = SimulatedFleet(asked, hardware, start_s=start_s, scaling=Oracle(plan, slots=slots))
            fleet.replicas.after_s = after_s
            fleet.run(progress)
            tried.append((sum(ttft_s * 1000 <= ttft_ms for ttft_s in fleet.statistics.ttft_s) / count, fleet))
        # A larger margin costs more.
        if max(share for share, _ in tried) >= 1 - MISSED_SHARE:
            break
    aim = min(1 - MISSED_SHARE, max(share for share, _ in tried) - EQUAL_SHARE)
    return min((fleet for share, fleet in tried if share >= aim), key=lambda fleet: fleet.replicas.stopped_s)


def _needed(asked: Sequence[TraceRequest], hardware: Hardware, *, slots: float) -> list[tuple[float, int]]:
    at_once = _AtOnce(slots)
    SimulatedFleet(asked, hardware, start_s=0.0, scaling=at_once).run()
    return at_once.needed


def _schedule(
    needed: Sequence[tuple[float, int]], *, start_s: float, gap_s: float
) -> list[tuple[float, int]]:
    """Return the desired replicas by time: ordered one start ahead, and kept over gaps of up to `gap_s`."""
    first_s = needed[0][0]
    changes: list[tuple[float, int]] = []
    began_s: list[float] = []
    ended_s: list[float] = []
    level = 0
    for now_s, count in needed:
        while level < count:
            if level == len(began_s):
                began_s.append(now_s)
                ended_s.append(now_s)
            elif now_s - ended_s[level] > gap_s:
                changes += ((max(first_s, began_s[level] - start_s), 1), (ended_s[level], -1))
                began_s[level] = now_s
            level += 1
        while level > count:
            level -= 1
            ended_s[level] = now_s
    for number, at_s in enumerate(began_s):
        changes.append((max(first_s, at_s - start_s), 1))
        if number >= level:
            changes.append((ended_s[number], -1))
    wanted = 0
    found = []
    for at_s, change in sorted(changes):
        wanted += change
        found.append((at_s, wanted))
    return found
