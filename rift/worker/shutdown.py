"""A worker's shutdown: it stops taking jobs and finishes running answers within a time limit.

drain      finish the answers that end within `within_s` seconds; other workers continue the rest at once
retire     finish all answers, however long they take: each has a deadline of its own
"""

import math

import anyio


class Shutdown:
    """`deadline_s`, by the loop's clock, is the earliest one requested: a later call can only shorten it."""

    def __init__(self) -> None:
        self.deadline_s = math.inf
        self._requested = anyio.Event()

    @property
    def is_requested(self) -> bool:
        return self._requested.is_set()

    def drain(self, within_s: float) -> None:
        self.deadline_s = min(self.deadline_s, anyio.current_time() + within_s)
        self._requested.set()

    def retire(self) -> None:
        self._requested.set()

    async def wait(self) -> None:
        await self._requested.wait()
