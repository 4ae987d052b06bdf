"""Which open requests the janitor looks at, so that it need not look at all of them.

A request is looked at once something has happened to it, at the time planned for it, and while its worker is
silent. A needless look costs a microsecond; a missed one would leave a request open.
"""

import heapq
from collections.abc import Callable, Collection, Iterator

import msgspec

from events.contracts import SECOND_NS, STALLED_PER_PROMPT_TOKEN_S, STALLED_S

# A time that does not come.
NEVER_NS = 1 << 62


def ns(duration_s: float) -> int:
    return int(duration_s * SECOND_NS)


class Agenda:
    """When to look at each request next."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, str]] = []
        # The time of the only entry of a request's that counts.
        self._planned_ns: dict[str, int] = {}
        self._touched: dict[str, None] = {}
        self._is_all = False

    def touch(self, request: str) -> None:
        """Look at a request the next time."""
        self._touched[request] = None

    def touch_all(self) -> None:
        """Look at every open request the next time."""
        self._is_all = True

    def plan(self, request: str, at_ns: int) -> None:
        """Look at a request at this time. An earlier plan stays."""
        if at_ns < self._planned_ns.get(request, NEVER_NS):
            self._planned_ns[request] = at_ns
            heapq.heappush(self._heap, (at_ns, request))

    def remove(self, request: str) -> None:
        self._planned_ns.pop(request, None)
        self._touched.pop(request, None)

    def due(self, now_ns: int, every: Collection[str]) -> list[str]:
        """Return the requests to look at now, and remove them. `every` are all open ones."""
        requests = dict.fromkeys(every) if self._is_all else self._touched
        self._touched = {}
        self._is_all = False
        while self._heap and self._heap[0][0] <= now_ns:
            at_ns, request = heapq.heappop(self._heap)
            if self._planned_ns.get(request) == at_ns:
                del self._planned_ns[request]
                requests[request] = None
        return list(requests)


class WorkerLoad(msgspec.Struct):
    """The open requests that a worker took last, their prompt tokens in all, and the last progress of those
    that run on it, the oldest first."""

    requests: int = 0
    prompt_tokens: int = 0
    progress_ns: dict[str, int] = msgspec.field(default_factory=dict)

    def bound_ns(self) -> int:
        """Return how long a request may make no progress: the worker may be reading the prompts of all its
        requests."""
        return ns(STALLED_S + self.prompt_tokens * STALLED_PER_PROMPT_TOKEN_S)


class WorkerLoads:
    """The load of every worker that has an open request."""

    def __init__(self) -> None:
        self._loads: dict[str, WorkerLoad] = {}

    def bound_ns(self, worker: str) -> int:
        return self._loads[worker].bound_ns()

    def add(self, worker: str, prompt_tokens: int) -> None:
        load = self._loads.setdefault(worker, WorkerLoad())
        load.requests += 1
        load.prompt_tokens += prompt_tokens

    def remove(self, worker: str, request: str, prompt_tokens: int) -> None:
        load = self._loads[worker]
        load.requests -= 1
        load.prompt_tokens -= prompt_tokens
        load.progress_ns.pop(request, None)
        if not load.requests:
            del self._loads[worker]

    def progressed(self, worker: str, request: str, at_ns: int) -> None:
        """Note a request's progress. No time is before an earlier call's."""
        progress_ns = self._loads[worker].progress_ns
        progress_ns.pop(request, None)
        progress_ns[request] = at_ns

    def stopped(self, worker: str, request: str) -> None:
        """Note that a request no longer runs on the worker."""
        self._loads[worker].progress_ns.pop(request, None)

    def silent(self, is_silent: Callable[[int, int], bool]) -> Iterator[str]:
        """Yield the requests for whose last progress and bound `is_silent` is true."""
        for load in self._loads.values():
            bound_ns = load.bound_ns()
            for request, at_ns in load.progress_ns.items():
                if not is_silent(at_ns, bound_ns):
                    break
                yield request
