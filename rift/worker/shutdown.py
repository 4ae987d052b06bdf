"""How a worker goes: it takes nothing more, and its answers have as long as it was told.

drain      what ends within so many seconds is finished; others continue the rest at once
retire     all of it is finished, however long: each answer has a deadline of its own
"""

import math

import anyio


class Shutdown:
    """`until` (by the loop's clock) is the earliest of what was told: a later word may shorten the time."""

    def __init__(self) -> None:
        self.until = math.inf
        self._told = anyio.Event()

    @property
    def is_told(self) -> bool:
        return self._told.is_set()

    def drain(self, within_s: float) -> None:
        self.until = min(self.until, anyio.current_time() + within_s)
        self._told.set()

    def retire(self) -> None:
        self._told.set()

    async def wait(self) -> None:
        await self._told.wait()
