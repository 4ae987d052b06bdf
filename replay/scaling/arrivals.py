"""The recent arrivals of one model in slots of time: what the floor of `floor.py` replays.

This module defines the slots, and keeps them in memory for simulations. `demand_query.py` computes the same
in SQL.
"""

from bisect import bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

import msgspec

from events.contracts import SECOND_NS

# Fine enough for targets of some 500 ms, and coarse enough that an hour has 14,400 slots.
SLOT_NS = SECOND_NS // 4
# The replayed past: the last hour, which is enough for many requests, and does not keep the replicas of a
# peak for long. Fewer requests are fewer bursts, and their largest recurs less often, so the past reaches
# back to REQUESTS_LONG requests of WINDOW_NS_LONG, and to REQUESTS_MIN of WINDOW_NS_MAX.
WINDOW_NS = 3600 * SECOND_NS
REQUESTS_LONG = 20_000
WINDOW_NS_LONG = 4 * WINDOW_NS
REQUESTS_MIN = 2000
WINDOW_NS_MAX = 24 * WINDOW_NS


class Slot(NamedTuple):
    """The requests that were accepted in [at, at + 1) times SLOT_NS.

    The sums cover the `ended` ones with output. `long` of the requests have a prompt that exceeds the target
    by itself.
    """

    at: int
    requests: int
    ended: int
    prompt_tokens: int
    output_tokens: int
    output_squares: int
    long: int


class Arrivals(msgspec.Struct, frozen=True):
    """The slots with requests in the replayed past, in order of time; `oldest` is the first of a day."""

    now_ns: int
    oldest: int
    slots: Sequence[Slot]


class RecentArrivals:
    """Arrivals that are kept up to date by events in order of time, for a day."""

    def __init__(self, *, long_tokens: int) -> None:
        self._long_tokens = long_tokens
        # By number, in order of time.
        self._slots: dict[int, Slot] = {}

    def accepted(self, at_ns: int) -> None:
        at = at_ns // SLOT_NS
        _, requests, *ended = self._slots.get(at) or Slot(at, 0, 0, 0, 0, 0, 0)
        self._slots[at] = Slot(at, requests + 1, *ended)

    def ended(self, accepted_at_ns: int, *, prompt_tokens: int, output_tokens: int) -> None:
        """Report the end of a request with output."""
        at = accepted_at_ns // SLOT_NS
        if (slot := self._slots.get(at)) is None:
            return
        self._slots[at] = Slot(
            at,
            slot.requests,
            slot.ended + 1,
            slot.prompt_tokens + prompt_tokens,
            slot.output_tokens + output_tokens,
            slot.output_squares + output_tokens * output_tokens,
            slot.long + (prompt_tokens > self._long_tokens),
        )

    def at(self, now_ns: int) -> Arrivals:
        """Return the slots of the replayed past as of `now_ns`, the time of the latest event or later."""
        slots = self._slots
        first = (now_ns - WINDOW_NS_MAX) // SLOT_NS
        while slots and (oldest := next(iter(slots))) <= first:
            del slots[oldest]
        day = list(slots.values())
        begin = bisect_right(day, (now_ns - WINDOW_NS) // SLOT_NS, key=itemgetter(0))
        earliest = bisect_right(day, (now_ns - WINDOW_NS_LONG) // SLOT_NS, key=itemgetter(0))
        requests = sum([slot[1] for slot in day[begin:]])
        while begin and requests < (REQUESTS_LONG if begin > earliest else REQUESTS_MIN):
            begin -= 1
            requests += day[begin].requests
        return Arrivals(now_ns, day[0].at if day else 0, day[begin:])
