"""What was asked of one model, and what its replicas were, as of a moment: all that `decide` knows.

What lives here: the two structs, what each field counts, and what keeps a Demand in memory for simulations.
What must not: SQL, which says the same of the log, and what follows (`decide.py`).

Everything is an integer, so it is the same on every machine; times are stored times, Unix nanoseconds. A
window of W holds what happened in (now - W, now]: at the moment itself yes, W before it no longer.
"""

from collections import deque

import msgspec

SECOND_NS = 1_000_000_000
# Arrivals are counted over a burst's beginning, over about what a start takes, and over the slow curve.
BURST_NS = 15 * SECOND_NS
MINUTE_NS = 60 * SECOND_NS
CURVE_NS = 300 * SECOND_NS
# How long answers are is remembered for an hour: enough of them to know, and it outlives an idle quarter.
ENDED_NS = 3600 * SECOND_NS
# Decoding slows with the load, so the same minutes say how fast it was and how full replicas were.
SPEED_NS = 600 * SECOND_NS
# Who waited longer than this for an attempt met a replica's start or a fleet too small, so its times are no
# sample of how fast a replica is.
WARM_NS = 2 * SECOND_NS


class Demand(msgspec.Struct, frozen=True):
    """One model's requests, of every account, as of `now_ns`. Only what was stored by then counts.

    Tokens are of ended requests alone: what a running one has made so far is nowhere here.
    """

    now_ns: int = 0
    # Accepted, not ended, no attempt that counted has started; and: one has.
    waiting: int = 0
    running: int = 0
    # Accepted in the windows of BURST_NS, MINUTE_NS, CURVE_NS.
    arrived_burst: int = 0
    arrived_minute: int = 0
    arrived_curve: int = 0
    # Ended in the window of ENDED_NS with at least one output token, and the sums of their tokens.
    ended: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    # Of those that ended in the window of SPEED_NS with at least two output tokens, and whose first attempt
    # started at most WARM_NS after the acceptance: the sums of last less first token's time, and of tokens
    # less one.
    decode_ns: int = 0
    decode_tokens: int = 0
    # The latest acceptance or end; 0: there was none.
    active_at_ns: int = 0


class Replicas(msgspec.Struct, frozen=True):
    """One model's replicas as of the same moment. `wanted` is the number decided last, 0 before the first."""

    wanted: int = 0
    ready: int = 0
    starting: int = 0
    draining: int = 0
    # The median of the last five starts; before the first, the hardware profile's.
    start_ns: int = 0
    # Starts that failed since the last that succeeded, and when the last of them did; 0: none.
    failed: int = 0
    failed_at_ns: int = 0
    # The last decision; 0: none.
    decided_at_ns: int = 0
    # Over the ReplicaReported stored in the window of SPEED_NS: the sums of `running` and of its square. The
    # second by the first is how many ran where a token was made.
    running_sum: int = 0
    running_square_sum: int = 0


class _Open:
    __slots__ = ("accepted_at_ns", "started_at_ns")

    def __init__(self, accepted_at_ns: int) -> None:
        self.accepted_at_ns = accepted_at_ns
        self.started_at_ns: int | None = None


class _Window:
    """Sums over the last W of what was added in order of time."""

    __slots__ = ("_rows", "_width_ns", "count", "first", "second")

    def __init__(self, width_ns: int) -> None:
        self._width_ns = width_ns
        self._rows: deque[tuple[int, int, int]] = deque()
        self.count = self.first = self.second = 0

    def add(self, at_ns: int, first: int = 0, second: int = 0) -> None:
        self._rows.append((at_ns, first, second))
        self.count += 1
        self.first += first
        self.second += second

    def until(self, now_ns: int) -> "_Window":
        """Forget what the window that ends now no longer holds."""
        rows, oldest = self._rows, now_ns - self._width_ns
        while rows and rows[0][0] <= oldest:
            _, first, second = rows.popleft()
            self.count -= 1
            self.first -= first
            self.second -= second
        return self


class Demands:
    """A Demand that is kept up to date: told what happens in order of time, it answers for now or later.

    `running` counts requests that run, not attempts: a second start of a request changes nothing.
    """

    def __init__(self) -> None:
        self._open: dict[object, _Open] = {}
        self._running = 0
        self._active_at_ns = 0
        self._arrived = tuple(_Window(width) for width in (BURST_NS, MINUTE_NS, CURVE_NS))
        self._ended = _Window(ENDED_NS)
        self._decoded = _Window(SPEED_NS)

    def accepted(self, request: object, at_ns: int) -> None:
        self._open[request] = _Open(at_ns)
        self._active_at_ns = at_ns
        for window in self._arrived:
            window.add(at_ns)

    def started(self, request: object, at_ns: int) -> None:
        one = self._open[request]
        if one.started_at_ns is None:
            one.started_at_ns = at_ns
            self._running += 1

    def ended(
        self, request: object, at_ns: int, *, prompt_tokens: int, output_tokens: int, decode_ns: int
    ) -> None:
        """`decode_ns` is the last token's time less the first's."""
        one = self._open.pop(request)
        self._active_at_ns = at_ns
        started_at_ns = one.started_at_ns
        if started_at_ns is not None:
            self._running -= 1
        if output_tokens:
            self._ended.add(at_ns, prompt_tokens, output_tokens)
        if output_tokens > 1 and started_at_ns is not None and started_at_ns - one.accepted_at_ns <= WARM_NS:
            self._decoded.add(at_ns, decode_ns, output_tokens - 1)

    def at(self, now_ns: int) -> Demand:
        burst, minute, curve = (window.until(now_ns).count for window in self._arrived)
        ended, decoded = self._ended.until(now_ns), self._decoded.until(now_ns)
        return Demand(
            now_ns=now_ns,
            waiting=len(self._open) - self._running,
            running=self._running,
            arrived_burst=burst,
            arrived_minute=minute,
            arrived_curve=curve,
            ended=ended.count,
            prompt_tokens=ended.first,
            output_tokens=ended.second,
            decode_ns=decoded.first,
            decode_tokens=decoded.second,
            active_at_ns=self._active_at_ns,
        )


class Reports:
    """The sums of `running` and its square over the ReplicaReported of the last SPEED_NS."""

    def __init__(self) -> None:
        self._reported = _Window(SPEED_NS)

    def reported(self, at_ns: int, running: int) -> None:
        self._reported.add(at_ns, running, running * running)

    def at(self, now_ns: int) -> tuple[int, int]:
        window = self._reported.until(now_ns)
        return window.first, window.second
