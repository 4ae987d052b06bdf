"""A fleet of one model's replicas in simulated time, event by event.

This module simulates the queue, the replicas and their clocks. A policy decides the number of replicas
(`policies.py`), and `run.py` computes the figures of a run.

Requests wait in one FIFO queue. A replica asks for one while it has a free slot, KV cache space for it and
fewer prompt tokens to fill than `events.fleet.unfilled_max`. The first that asked takes it. A replica
prefills its prompts one by one; the end of a prefill is the first token. From then on each step gives every
request one token and takes `step_us` + `step_us_per_running` x running. Prefills do not slow the steps,
because the profile's decode figures were measured with prefill included. A draining replica takes no more
requests and stops when it is empty. No start fails.

All requests that decode on a replica advance together, so a replica has one clock in tokens: a request ends
when the clock reads its value at the first token plus the remaining tokens. Each event costs O(log n).
"""

from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from operator import attrgetter
from typing import NamedTuple, Protocol

from events.fleet import unfilled_max
from replay.errors import ReplayError
from replay.scaling.demand import Demands
from replay.scaling.hardware import Hardware

NEVER = float("inf")
_load = attrgetter("load")
# The token clock is a float. This is far less than one token and far more than the clock's error.
TOKEN_ERROR = 1e-6
# If no replica exists this long after the last arrival, the policy will never start one.
PATIENCE_S = 86_400.0
# The TTFT target, unless another one is set.
TTFT_MS = 2000
# Ticks between two reports of progress: about ten reports a second.
PROGRESS_TICKS = 512


class NothingStarts(ReplayError):
    """Requests wait, and the policy starts no replica for them."""


class TraceRequest(NamedTuple):
    """One request of a trace; `at_s` counts from the trace's beginning."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


class Scaling(Protocol):
    """Decides the number of replicas.

    The fleet calls `decide` every `tick_s`, and when a request arrives while no replica is wanted. None keeps
    the number. If the policy has `demands`, the fleet reports every request to it.
    """

    tick_s: float
    demands: Demands | None

    def decide(self, now_s: float, fleet: "SimulatedFleet") -> int | None: ...


class SimulatedReplica:
    __slots__ = (
        "at_s",
        "clock",
        "draining",
        "due_s",
        "ends",
        "number",
        "ordered_s",
        "prefilled_s",
        "prompts",
        "ready_s",
        "tokens",
        "unfilled",
    )

    def __init__(self, number: int, now_s: float, ready_s: float) -> None:
        self.number = number
        self.ordered_s = now_s
        self.ready_s = ready_s
        self.draining = False
        # The tokens of all requests on the replica, and those of the prompts that are not filled.
        self.tokens = 0
        self.unfilled = 0
        # Tokens that a request that decoded from the beginning would have at `at_s`.
        self.clock = 0.0
        self.at_s = ready_s
        # Requests that decode, by the clock's value at their end; and prompts, by the end of their prefill.
        self.ends: list[tuple[float, int]] = []
        self.prompts: deque[tuple[float, int]] = deque()
        self.prefilled_s = ready_s
        # Time of the replica's next event.
        self.due_s = ready_s

    @property
    def load(self) -> int:
        return len(self.prompts) + len(self.ends)


class ReplicaPool:
    """The replicas by state, and the queue of their events."""

    def __init__(self) -> None:
        self.starting: list[SimulatedReplica] = []
        # In the order in which they asked for their next request.
        self.ready: list[SimulatedReplica] = []
        self.draining: list[SimulatedReplica] = []
        # Replicas ever ordered, and the seconds from order to stop of those that stopped, after `after_s`.
        self.ordered = 0
        self.after_s = 0.0
        self.stopped_s = 0.0
        self._alive: dict[int, SimulatedReplica] = {}
        # A replica may have several entries; only the one at its `due_s` is an event.
        self.events: list[tuple[float, int]] = []

    def __bool__(self) -> bool:
        return bool(self._alive)

    def order(self, now_s: float, ready_s: float) -> None:
        self.ordered += 1
        replica = SimulatedReplica(self.ordered, now_s, ready_s)
        self._alive[replica.number] = replica
        self.starting.append(replica)
        heappush(self.events, (ready_s, replica.number))

    def stop(self, replica: SimulatedReplica, now_s: float) -> None:
        del self._alive[replica.number]
        self.stopped_s += max(0.0, now_s - max(replica.ordered_s, self.after_s))

    def remove(self, count: int, now_s: float) -> None:
        """Remove replicas: first those that started last, then those with the least load."""
        for _ in range(count):
            if self.starting:
                self.stop(self.starting.pop(), now_s)
                continue
            replica = min(self.ready, key=_load)
            self.ready.remove(replica)
            if replica.load:
                replica.draining = True
                self.draining.append(replica)
            else:
                self.stop(replica, now_s)

    def next_event(self) -> tuple[float, SimulatedReplica | None]:
        """Return the time of the next entry, and its replica unless the entry is out of date."""
        due_s, number = heappop(self.events)
        replica = self._alive.get(number)
        return due_s, replica if replica is not None and replica.due_s == due_s else None

    def stop_all(self, now_s: float) -> None:
        for replica in list(self._alive.values()):
            self.stop(replica, now_s)


class Concurrency:
    """Requests under way, and the integral of their number over time: its slope is the mean concurrency."""

    __slots__ = ("at_s", "integral_s", "under_way")

    def __init__(self) -> None:
        self.under_way = 0
        self.integral_s = 0.0
        self.at_s = 0.0

    def advance(self, now_s: float) -> None:
        self.integral_s += self.under_way * (now_s - self.at_s)
        self.at_s = now_s


class Statistics:
    """The record of a run."""

    def __init__(self, requests: int) -> None:
        # By request: the time to its first token.
        self.ttft_s = [0.0] * requests
        self.ended = 0
        self.waited_for_start = 0
        # Requests that arrived while no replica was ready.
        self.at_zero: set[int] = set()
        self.scale_actions = 0
        # Each change: its time, the number wanted, the number ready.
        self.history: list[tuple[float, int, int]] = []


class SimulatedFleet:
    """Serves `trace`, which is in order of time; `statistics` is complete after `run`."""

    def __init__(
        self,
        trace: Sequence[TraceRequest],
        hardware: Hardware,
        *,
        start_s: float,
        scaling: Scaling,
        ttft_ms: int = TTFT_MS,
    ) -> None:
        self.trace = trace
        self.hardware = hardware
        self.wanted = 0
        self.queue: deque[int] = deque()
        self.replicas = ReplicaPool()
        self.concurrency = Concurrency()
        self.statistics = Statistics(len(trace))
        self._unfilled_max = unfilled_max(ttft_ms, hardware.prefill_tokens_per_s)
        self._start_s = start_s
        self._scaling = scaling
        self._demands = scaling.demands
        self._step_s = [hardware.step_us_at(running) / 1e6 for running in range(hardware.running_max + 1)]

    def run(self, progress: Callable[[float], None] | None = None) -> None:
        """Serve the trace; report the share that has ended to `progress`. Raises NothingStarts."""
        trace = self.trace
        replicas = self.replicas
        events = replicas.events
        statistics = self.statistics
        count = len(trace)
        number = 0
        ticks = 0
        arrival_s = trace[0].at_s if trace else NEVER
        now_s = arrival_s
        tick_s = arrival_s + self._scaling.tick_s
        while statistics.ended < count:
            due_s = events[0][0] if events else NEVER
            if tick_s <= due_s and tick_s < arrival_s:
                now_s = tick_s
                self._decide(now_s)
                tick_s += self._scaling.tick_s
                ticks += 1
                if progress is not None and ticks % PROGRESS_TICKS == 0:
                    progress(statistics.ended / count)
                if number == count and now_s > trace[-1].at_s + PATIENCE_S and not replicas:
                    raise NothingStarts(f"{len(self.queue)} requests wait, and the policy starts no replica")
            elif arrival_s <= due_s:
                now_s = arrival_s
                self._arrive(number, now_s)
                number += 1
                arrival_s = trace[number].at_s if number < count else NEVER
            else:
                now_s, replica = replicas.next_event()
                if replica is not None:
                    self._advance(replica, now_s)
        replicas.stop_all(now_s)

    def _decide(self, now_s: float) -> None:
        self.concurrency.advance(now_s)
        wanted = self._scaling.decide(now_s, self)
        if wanted is None or wanted == self.wanted:
            return
        replicas = self.replicas
        self.statistics.scale_actions += 1
        self.wanted = wanted
        missing = wanted - len(replicas.ready) - len(replicas.starting)
        for _ in range(missing):
            replicas.order(now_s, now_s + self._start_s)
        replicas.remove(-missing, now_s)
        self.statistics.history.append((now_s, wanted, len(replicas.ready)))

    def _arrive(self, number: int, now_s: float) -> None:
        self.concurrency.advance(now_s)
        self.concurrency.under_way += 1
        if not self.replicas.ready:
            self.statistics.at_zero.add(number)
        if self._demands is not None:
            self._demands.accepted(number, int(now_s * 1e9))
        if self.queue or not self._assign(number, now_s):
            self.queue.append(number)
        if not self.wanted:
            self._decide(now_s)

    def _assign(self, number: int, now_s: float) -> bool:
        """Give a request to the replica that asked for one first, if any does."""
        ready = self.replicas.ready
        for at, replica in enumerate(ready):
            if self._takes(replica, number):
                ready.append(ready.pop(at))
                self._start(replica, number, now_s)
                return True
        return False

    def _takes(self, replica: SimulatedReplica, number: int) -> bool:
        if replica.unfilled >= self._unfilled_max:
            return False
        load = replica.load
        if not load:
            return True
        request = self.trace[number]
        return (
            load < self.hardware.running_max
            and replica.tokens + request.prompt_tokens + request.output_tokens <= self.hardware.kv_tokens
        )

    def _start(self, replica: SimulatedReplica, number: int, now_s: float) -> None:
        request = self.trace[number]
        replica.tokens += request.prompt_tokens + request.output_tokens
        replica.unfilled += request.prompt_tokens
        prefill_s = replica.prefilled_s if replica.prefilled_s > now_s else now_s
        first_s = prefill_s + request.prompt_tokens / self.hardware.prefill_tokens_per_s
        replica.prefilled_s = first_s
        self.statistics.ttft_s[number] = first_s - request.at_s
        self.statistics.waited_for_start += replica.ready_s > request.at_s
        replica.prompts.append((first_s, number))
        if first_s < replica.due_s:
            replica.due_s = first_s
            heappush(self.replicas.events, (first_s, replica.number))
        if self._demands is not None:
            self._demands.started(number, int(now_s * 1e9))

    def _advance(self, replica: SimulatedReplica, now_s: float) -> None:
        """Bring a replica to `now_s`, the time of its next event."""
        if replica.ready_s == now_s and replica in self.replicas.starting:
            self._become_ready(replica, now_s)
            return
        ends = replica.ends
        prompts = replica.prompts
        if ends:
            replica.clock += (now_s - replica.at_s) / self._step_s[len(ends)]
        replica.at_s = now_s
        while ends and ends[0][0] <= replica.clock + TOKEN_ERROR:
            self._end(replica, heappop(ends)[1], now_s)
        while prompts and prompts[0][0] <= now_s:
            number = prompts.popleft()[1]
            replica.unfilled -= self.trace[number].prompt_tokens
            if (remaining := self.trace[number].output_tokens - 1) > 0:
                heappush(ends, (replica.clock + remaining, number))
            else:
                self._end(replica, number, now_s)
        replica.due_s = NEVER
        if ends:
            replica.due_s = now_s + (ends[0][0] - replica.clock) * self._step_s[len(ends)]
        if prompts and prompts[0][0] < replica.due_s:
            replica.due_s = prompts[0][0]
        if replica.due_s < NEVER:
            heappush(self.replicas.events, (replica.due_s, replica.number))
        if replica.draining:
            if not replica.load:
                self.replicas.draining.remove(replica)
                self.replicas.stop(replica, now_s)
        # All other replicas have refused the first of the queue.
        elif self.queue and self._takes(replica, self.queue[0]):
            self._drain_queue(now_s)

    def _become_ready(self, replica: SimulatedReplica, now_s: float) -> None:
        replica.due_s = NEVER
        self.replicas.starting.remove(replica)
        self.replicas.ready.append(replica)
        self.statistics.history.append((now_s, self.wanted, len(self.replicas.ready)))
        self._drain_queue(now_s)

    def _drain_queue(self, now_s: float) -> None:
        while self.queue and self._assign(self.queue[0], now_s):
            self.queue.popleft()

    def _end(self, replica: SimulatedReplica, number: int, now_s: float) -> None:
        self.concurrency.advance(now_s)
        self.concurrency.under_way -= 1
        self.statistics.ended += 1
        request = self.trace[number]
        replica.tokens -= request.prompt_tokens + request.output_tokens
        if self._demands is not None:
            self._demands.ended(
                number,
                int(now_s * 1e9),
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
                decode_ns=int((now_s - request.at_s - self.statistics.ttft_s[number]) * 1e9),
            )
