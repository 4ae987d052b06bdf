"""The recent arrivals of one model in slots of time: what the floor of `floor.py` replays.

This module defines the slots, and keeps them in memory for simulations. `demand_query.py` computes the same
in SQL.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from events.contracts import SECOND_NS

# Fine enough for targets of some 500 ms, and coarse enough that an hour has 14,400 slots.
SLOT_NS = SECOND_NS // 4
# The replayed past: two hours, because shorter windows miss bursts that recur. If it holds fewer requests
# than REQUESTS_MIN, it reaches back to that many of them, but at most a day.
WINDOW_NS = 2 * 3600 * SECOND_NS
REQUESTS_MIN = 2000
WINDOW_NS_MAX = 12 * WINDOW_NS


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
        # By number: the fields of a Slot. Once all of its requests have ended, it is one.
        self._slots: dict[int, list[int] | Slot] = {}

    def accepted(self, at_ns: int) -> None:
        at = at_ns // SLOT_NS
        slot = self._slots.get(at)
        if not isinstance(slot, list):
            slot = self._slots[at] = [at, 0, 0, 0, 0, 0, 0] if slot is None else list(slot)
        slot[1] += 1

    def ended(self, accepted_at_ns: int, *, prompt_tokens: int, output_tokens: int) -> None:
        """Report the end of a request with output."""
        at = accepted_at_ns // SLOT_NS
        slot = self._slots.get(at)
        if not isinstance(slot, list):
            return
        slot[2] += 1
        slot[3] += prompt_tokens
        slot[4] += output_tokens
        slot[5] += output_tokens * output_tokens
        slot[6] += prompt_tokens > self._long_tokens
        if slot[1] == slot[2]:
            self._slots[at] = Slot(*slot)

    def at(self, now_ns: int) -> Arrivals:
        """Return the slots of the replayed past as of `now_ns`, the time of the latest event or later."""
        slots = self._slots
        first = (now_ns - WINDOW_NS_MAX) // SLOT_NS
        while slots and (oldest := next(iter(slots))) <= first:
            del slots[oldest]
        recent: list[Slot] = []
        since = (now_ns - WINDOW_NS) // SLOT_NS
        requests = 0
        for at in reversed(slots):
            if at <= since and requests >= REQUESTS_MIN:
                break
            slot = slots[at]
            requests += slot[1]
            recent.append(slot if isinstance(slot, Slot) else Slot(*slot))
        recent.reverse()
        return Arrivals(now_ns, next(iter(slots), 0), recent)
