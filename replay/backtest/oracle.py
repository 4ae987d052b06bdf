"""The policy that knows the future: its fleet is what the others are measured by.

What lives here: its schedule. It sees every request's time and tokens in advance, but a replica takes as long
to start for it as for anybody, and it has none and orders none before the trace begins.

First the trace is served by a fleet whose starts take no time, with as many replicas at each moment as hold
what is under way and a margin: that is what is needed, when. Then each of these replicas is ordered ahead by
a start, and kept over a gap that is shorter than ending its answers and starting again would take. Margins
are tried from none on: the first counts whose schedules, with real starts, serve 99 % in time, and of these
the cheapest; where none does, what serves most. Who waits all the same, since a schedule knows nothing of
how answers are spread over replicas, is held by more. A schedule that no such rule finds may be cheaper.
"""

from collections.abc import Callable, Sequence

from replay.backtest.simulator import SimulatedFleet, TraceRequest
from replay.scaling.demand import Demands
from replay.scaling.hardware import MISSED_SHARE, Hardware

TICK_S = 1.0
# Slots kept free, as a share of all.
MARGINS = (0.0, 0.1, 0.2, 0.3, 0.45)
# How many mean answers it takes a replica to end its own: a few are very long.
ENDING_ANSWERS = (4.0, 8.0)
# Schedules that serve equally many, but for so small a share, differ by their cost.
EQUAL_SHARE = 0.0005


class _AtOnce:
    """As many as hold what is under way now: for a fleet whose starts take no time."""

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
    """Follows a schedule: so many replicas from each time on, and as many more as hold who waits."""

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
        if fleet.queue:
            return max(self._wanted, len(fleet.replicas.ready) + -(-len(fleet.queue) // self._slots))
        return max(self._wanted, min(1, fleet.concurrency.under_way))


def best(
    asked: Sequence[TraceRequest],
    hardware: Hardware,
    *,
    start_s: float,
    ttft_ms: int,
    progress: Callable[[float], None] | None = None,
) -> SimulatedFleet:
    """Return the fleet of the best schedule, when it has served all; `progress` is told of each tried."""
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
    """Return when how many are wanted: the n-th whenever n are needed, ordered ahead, short gaps kept."""
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
