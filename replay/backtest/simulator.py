"""A fleet of one model's replicas in simulated time, event by event.

What lives here: the queue, the replicas and their clocks. What must not: how many replicas there shall be
(`policies.py`) and what comes of it (`run.py`).

Requests wait in one queue, first come, first served; each ready replica with a free slot and room for their
tokens takes them, the emptiest first. A replica fills their prompts one by one; the end of that is the first
token. From then on each step gives every request one token, and takes `step_us` + `step_us_per_running` x
running, prompts not counted: the profile's decode figures hold what prefill takes from decoding. A
draining replica takes nothing more and stops once it is empty. No start fails.

Of a replica all that decode advance alike, so it has one clock in tokens: a request ends where the clock
reads what it did at its first token, and the rest of its tokens. Each event costs O(log n).
"""

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import NamedTuple, Protocol

from replay.errors import ReplayError
from replay.scaling.demand import Demands
from replay.scaling.hardware import Hardware

NEVER = float("inf")
# Ends are found by their token on a clock of floats: far less than a token, far more than the clock's error.
TOKEN_ERROR = 1e-6
# So long after the last arrival nobody waits for a replica any more: the policy starts none.
PATIENCE_S = 86_400.0
# After so many ticks progress is told: some ten times a second.
TICKS_TOLD = 512


class NothingStarts(ReplayError):
    """Requests wait, and the policy starts no replica for them."""


class TraceRequest(NamedTuple):
    """One request of a trace; `at_s` counts from the trace's beginning."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


class Scaling(Protocol):
    """Who says how many replicas there shall be. It is asked every `tick_s`, and when a request comes while
    none is wanted; None leaves it. `demands`, if it has one, is told what happens."""

    tick_s: float
    demands: Demands | None

    def decide(self, now_s: float, fleet: "SimulatedFleet") -> int | None: ...


class Replica:
    __slots__ = (
        "at_s",
        "clock",
        "decoding",
        "draining",
        "due_s",
        "ends",
        "load",
        "number",
        "ordered_s",
        "prefilled_s",
        "prompts",
        "ready_s",
        "tokens",
    )

    def __init__(self, number: int, now_s: float, ready_s: float) -> None:
        self.number = number
        self.ordered_s = now_s
        # When it will be ready, or was.
        self.ready_s = ready_s
        self.draining = False
        # Requests that it has taken and not ended, those of them that decode, and the tokens of all.
        self.load = self.decoding = self.tokens = 0
        # Tokens that each has had that decodes since the beginning, as of when.
        self.clock = 0.0
        self.at_s = ready_s
        self.ends: list[tuple[float, int]] = []
        self.prompts: deque[tuple[float, int]] = deque()
        self.prefilled_s = ready_s
        # When something happens to it next.
        self.due_s = ready_s


class SimulatedFleet:
    """Serves `asked`, which is in order of time; after `run`, `ttft_s` is each one's time to first token."""

    def __init__(
        self, asked: Sequence[TraceRequest], hardware: Hardware, *, start_s: float, scaling: Scaling
    ) -> None:
        self.asked = asked
        self.hardware = hardware
        self.start_s = start_s
        self.ttft_s = [0.0] * len(asked)
        self.wanted = 0
        # Requests under way, and their time since the beginning: its growth by the time's is concurrency.
        self.under_way = 0
        self.area_s = 0.0
        self.queue: deque[int] = deque()
        self.ready: list[Replica] = []
        self.starting: list[Replica] = []
        self.draining: list[Replica] = []
        self.replica_s = 0.0
        self.started = self.waited_for_start = self.actions = 0
        # Each change: when, how many were wanted, how many were ready.
        self.history: list[tuple[float, int, int]] = []
        self._scaling = scaling
        self._demands = scaling.demands
        self._area_at_s = 0.0
        self._came = self._ended = 0
        self._decode_s = [0.0] * len(asked)
        self._events: list[tuple[float, int]] = []
        self._replicas: dict[int, Replica] = {}
        steps = range(hardware.running_max + 1)
        self._step_s = [hardware.step_us_at(running) / 1e6 for running in steps]

    def run(self, progress: Callable[[float], None] | None = None) -> None:
        """Serve all; `progress` is told the share of what has ended, now and then. Raises NothingStarts."""
        asked = self.asked
        events = self._events
        tick_s = self._scaling.tick_s
        number = 0
        count = len(asked)
        ticks = 0
        come_s = asked[0].at_s if asked else NEVER
        now_s = come_s
        tick = come_s + tick_s
        while self._ended < count:
            due_s = events[0][0] if events else NEVER
            if tick <= due_s and tick < come_s:
                now_s = tick
                self._ask(now_s)
                tick += tick_s
                ticks += 1
                if progress is not None and ticks % TICKS_TOLD == 0:
                    progress(self._ended / count)
                if number == count and now_s > asked[-1].at_s + PATIENCE_S and not self._replicas:
                    raise NothingStarts(f"{len(self.queue)} requests wait, and the policy starts no replica")
            elif come_s <= due_s:
                now_s = come_s
                self._arrive(number, now_s)
                number += 1
                come_s = asked[number].at_s if number < count else NEVER
            else:
                now_s, which = heappop(events)
                replica = self._replicas.get(which)
                if replica is not None and replica.due_s == now_s:
                    self._happen(replica, now_s)
        for replica in self._replicas.values():
            self.replica_s += now_s - replica.ordered_s

    def _ask(self, now_s: float) -> None:
        self.area_s += self.under_way * (now_s - self._area_at_s)
        self._area_at_s = now_s
        wanted = self._scaling.decide(now_s, self)
        if wanted is not None and wanted != self.wanted:
            self._scale(wanted, now_s)

    def _scale(self, wanted: int, now_s: float) -> None:
        """Bring it about: those that start last are given up first, then those with the least to do."""
        self.actions += 1
        self.wanted = wanted
        for _ in range(wanted - len(self.ready) - len(self.starting)):
            self.started += 1
            replica = Replica(self.started, now_s, now_s + self.start_s)
            self._replicas[replica.number] = replica
            self.starting.append(replica)
            heappush(self._events, (replica.due_s, replica.number))
        for _ in range(len(self.ready) + len(self.starting) - wanted):
            if self.starting:
                self._stop(self.starting.pop(), now_s)
                continue
            replica = min(self.ready, key=_load)
            self.ready.remove(replica)
            if replica.load:
                replica.draining = True
                self.draining.append(replica)
            else:
                self._stop(replica, now_s)
        self.history.append((now_s, wanted, len(self.ready)))

    def _stop(self, replica: Replica, now_s: float) -> None:
        del self._replicas[replica.number]
        self.replica_s += now_s - replica.ordered_s

    def _arrive(self, number: int, now_s: float) -> None:
        self.area_s += self.under_way * (now_s - self._area_at_s)
        self._area_at_s = now_s
        self.under_way += 1
        if self._demands is not None:
            self._demands.accepted(number, int(now_s * 1e9))
        if self.queue or not self._taken(number, now_s):
            self.queue.append(number)
        if not self.wanted:
            self._ask(now_s)

    def _taken(self, number: int, now_s: float) -> bool:
        replica = min(self.ready, key=_load, default=None)
        if replica is None or replica.load >= self.hardware.running_max:
            return False
        if not self._has_room(replica, number):
            # It is the tokens that it has no room for: another may, with more requests.
            others = [other for other in sorted(self.ready, key=_load) if self._has_room(other, number)]
            if not others:
                return False
            replica = others[0]
        self._take(replica, number, now_s)
        return True

    def _has_room(self, replica: Replica, number: int) -> bool:
        if not replica.load:
            return True
        one = self.asked[number]
        return (
            replica.load < self.hardware.running_max
            and replica.tokens + one.prompt_tokens + one.output_tokens <= self.hardware.kv_tokens
        )

    def _take(self, replica: Replica, number: int, now_s: float) -> None:
        one = self.asked[number]
        replica.load += 1
        replica.tokens += one.prompt_tokens + one.output_tokens
        begun_s = replica.prefilled_s if replica.prefilled_s > now_s else now_s
        replica.prefilled_s = first_s = begun_s + one.prompt_tokens / self.hardware.prefill_tokens_per_s
        self.ttft_s[number] = first_s - one.at_s
        self._decode_s[number] = first_s
        self.waited_for_start += replica.ready_s > one.at_s
        replica.prompts.append((first_s, number))
        if first_s < replica.due_s:
            replica.due_s = first_s
            heappush(self._events, (first_s, replica.number))
        if self._demands is not None:
            self._demands.started(number, int(now_s * 1e9))

    def _happen(self, replica: Replica, now_s: float) -> None:
        if replica.ready_s == now_s and replica in self.starting:
            replica.due_s = NEVER
            self.starting.remove(replica)
            self.ready.append(replica)
            self.history.append((now_s, self.wanted, len(self.ready)))
            self._pull(now_s)
            return
        if replica.decoding:
            replica.clock += (now_s - replica.at_s) / self._step_s[replica.decoding]
        replica.at_s = now_s
        ends = replica.ends
        prompts = replica.prompts
        while ends and ends[0][0] <= replica.clock + TOKEN_ERROR:
            replica.decoding -= 1
            self._end(replica, heappop(ends)[1], now_s)
        while prompts and prompts[0][0] <= now_s:
            number = prompts.popleft()[1]
            if (rest := self.asked[number].output_tokens - 1) > 0:
                heappush(ends, (replica.clock + rest, number))
                replica.decoding += 1
            else:
                self._end(replica, number, now_s)
        replica.due_s = NEVER
        if ends:
            replica.due_s = now_s + (ends[0][0] - replica.clock) * self._step_s[replica.decoding]
        if prompts and prompts[0][0] < replica.due_s:
            replica.due_s = prompts[0][0]
        if replica.due_s < NEVER:
            heappush(self._events, (replica.due_s, replica.number))
        if replica.draining:
            if not replica.load:
                self.draining.remove(replica)
                self._stop(replica, now_s)
        elif self.queue:
            self._pull(now_s)

    def _pull(self, now_s: float) -> None:
        while self.queue and self._taken(self.queue[0], now_s):
            self.queue.popleft()

    def _end(self, replica: Replica, number: int, now_s: float) -> None:
        self.area_s += self.under_way * (now_s - self._area_at_s)
        self._area_at_s = now_s
        self.under_way -= 1
        self._ended += 1
        one = self.asked[number]
        replica.load -= 1
        replica.tokens -= one.prompt_tokens + one.output_tokens
        if self._demands is not None:
            self._demands.ended(
                number,
                int(now_s * 1e9),
                prompt_tokens=one.prompt_tokens,
                output_tokens=one.output_tokens,
                decode_ns=int((now_s - self._decode_s[number]) * 1e9),
            )


def _load(replica: Replica) -> int:
    return replica.load
