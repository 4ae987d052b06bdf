"""The demand for one model and its replicas as of a moment: the inputs of `decide`.

This module defines the two structs, the meaning of each field, and an in-memory Demand for simulations.
`demand_query.py` computes the same Demand in SQL, and `policy.py` decides.

All fields are integers, so every machine computes the same values. Times are stored times in Unix
nanoseconds. A window of W is (now - W, now].
"""

from bisect import bisect_right

import msgspec

from events.contracts import SECOND_NS
from replay.scaling.arrivals import RecentArrivals
from replay.scaling.hardware import Hardware

MINUTE_NS = 60 * SECOND_NS
# The number of open requests is sampled every half minute over the last five minutes. The first two samples
# give the growth, and all of them the peak that scaling down must respect.
PAST_NS = 30 * SECOND_NS
PASTS = 10
# Answer lengths are averaged over an hour: enough samples, also after an idle quarter of an hour.
ENDED_NS = 3600 * SECOND_NS
# Decoding slows with the load, so speed and load are taken from the same minutes.
SPEED_NS = 600 * SECOND_NS


class Demand(msgspec.Struct, frozen=True):
    """The requests of one model, across all accounts, as of `now_ns`. Only events stored by then count.

    Tokens are those of ended requests; the tokens of running ones are not included.
    """

    now_ns: int = 0
    # Open requests without and with an attempt that counted.
    waiting: int = 0
    running: int = 0
    # Open requests, waiting or running, at now - PAST_NS, now - 2 PAST_NS and so on: accepted at or before
    # that time, and not ended by then.
    past: tuple[int, ...] = (0,) * PASTS
    # Requests accepted in the window of MINUTE_NS.
    arrived_minute: int = 0
    # Requests that ended in the window of ENDED_NS with at least one output token, and their token sums.
    ended: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    # The decode speed: sums of the time between first and last token, and of the tokens after the first. They
    # cover requests that ended in the window of SPEED_NS with at least two output tokens.
    decode_ns: int = 0
    decode_tokens: int = 0
    # Time of the latest acceptance or end; 0 if there is none.
    active_at_ns: int = 0


class Replicas(msgspec.Struct, frozen=True):
    """One model's replicas as of the same moment. `wanted` is the latest decision, 0 before the first."""

    wanted: int = 0
    ready: int = 0
    starting: int = 0
    draining: int = 0
    # The median of the last five starts; before the first, the hardware profile's.
    start_ns: int = 0
    # Failed starts since the last successful one, and the time of the latest failure; 0 if there is none.
    failed: int = 0
    failed_at_ns: int = 0
    # Time of the last decision; 0 if there is none.
    decided_at_ns: int = 0
    # Sums over the ReplicaReported events stored in the window of SPEED_NS: of `running`, and of the tokens
    # that the profile's replica makes in a thousand seconds at that load. The first divided by the second is
    # the profile's time per token. A mean load would not give it, because a step at a small load makes fewer
    # tokens in less time.
    running_sum: int = 0
    tokens_per_ks_sum: int = 0


class _Sums:
    """Running totals in order of time, so that a window's sums take two look-ups."""

    __slots__ = ("at_ns", "first", "second", "width_ns")

    def __init__(self, width_ns: int) -> None:
        self.width_ns = width_ns
        self.at_ns: list[int] = []
        self.first = [0]
        self.second = [0]

    def add(self, at_ns: int, first: int, second: int) -> None:
        self.at_ns.append(at_ns)
        self.first.append(self.first[-1] + first)
        self.second.append(self.second[-1] + second)

    def until(self, now_ns: int) -> tuple[int, int, int]:
        """Return the count and both sums of the window that ends at `now_ns`. No entry may be later."""
        past = bisect_right(self.at_ns, now_ns - self.width_ns)
        count = len(self.at_ns) - past
        return count, self.first[-1] - self.first[past], self.second[-1] - self.second[past]


class Demands:
    """A Demand that is kept up to date by events in order of time. It keeps all of them.

    `arrivals` are the same requests in slots, for the floor.
    """

    def __init__(self, *, long_tokens: int = 0) -> None:
        self.arrivals = RecentArrivals(long_tokens=long_tokens)
        # By request: the time of acceptance.
        self._waiting: dict[object, int] = {}
        self._running: dict[object, int] = {}
        self._arrived_at_ns: list[int] = []
        self._left_at_ns: list[int] = []
        self._ended = _Sums(ENDED_NS)
        self._decoded = _Sums(SPEED_NS)
        self._active_at_ns = 0

    def accepted(self, request: object, at_ns: int) -> None:
        self._waiting[request] = self._active_at_ns = at_ns
        self._arrived_at_ns.append(at_ns)
        self.arrivals.accepted(at_ns)

    def started(self, request: object, at_ns: int) -> None:
        """Report the start of a request's first attempt that counts; later attempts are not reported."""
        self._running[request] = self._waiting.pop(request)

    def ended(
        self, request: object, at_ns: int, *, prompt_tokens: int, output_tokens: int, decode_ns: int
    ) -> None:
        """Report the end of a request; `decode_ns` is the time between its first and last token."""
        self._active_at_ns = at_ns
        self._left_at_ns.append(at_ns)
        under_way = self._running if request in self._running else self._waiting
        accepted_at_ns = under_way.pop(request)
        if output_tokens:
            self._ended.add(at_ns, prompt_tokens, output_tokens)
            self.arrivals.ended(accepted_at_ns, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        if output_tokens > 1:
            self._decoded.add(at_ns, decode_ns, output_tokens - 1)

    def at(self, now_ns: int) -> Demand:
        """Return the Demand as of `now_ns`, the time of the latest event or later."""
        arrived = self._arrived_at_ns
        left = self._left_at_ns
        times_ns = [now_ns - PAST_NS * back for back in range(1, PASTS + 1)]
        ended, prompt_tokens, output_tokens = self._ended.until(now_ns)
        _, decode_ns, decode_tokens = self._decoded.until(now_ns)
        return Demand(
            now_ns=now_ns,
            waiting=len(self._waiting),
            running=len(self._running),
            past=tuple(bisect_right(arrived, at_ns) - bisect_right(left, at_ns) for at_ns in times_ns),
            arrived_minute=len(arrived) - bisect_right(arrived, now_ns - MINUTE_NS),
            ended=ended,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            decode_ns=decode_ns,
            decode_tokens=decode_tokens,
            active_at_ns=self._active_at_ns,
        )


class Reports:
    """The sums of `Replicas` over the ReplicaReported of the last SPEED_NS."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._reported = _Sums(SPEED_NS)

    def reported(self, at_ns: int, running: int) -> None:
        self._reported.add(at_ns, running, self._hardware.tokens_per_ks_at(running))

    def at(self, now_ns: int) -> tuple[int, int]:
        _, running, tokens_per_ks = self._reported.until(now_ns)
        return running, tokens_per_ks
