"""Who runs beside whom: a suspect runs alone, everybody else beside each other.

A suspect is a request that an engine may have died of. If it dies of it again, nobody else does.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from events.lifecycle import Life, deaths
from events.schema import Problem

# So many attempts that ended without a word are the request's own doing. From the second on, or when the
# engine was seen to die, a request is a suspect, and runs alone.
DEATHS_MAX = 3
SUSPECT_DEATHS = 2
POISON = Problem(code="poison", message="three engines ended under this request; it is not tried again")


def is_suspect(life: Life) -> bool:
    """Say whether the request may be what its engines die of."""
    return life.released == "lost" or deaths(life) >= SUSPECT_DEATHS


class Isolation:
    def __init__(self) -> None:
        self._suspects = 0
        self._others = 0
        self._turn = anyio.Lock()
        self._changed = anyio.Event()

    @property
    def is_wanted(self) -> bool:
        """A suspect waits or runs: nobody else should be fetched."""
        return self._suspects > 0

    def announce(self) -> None:
        """A suspect is about to ask for `alone`."""
        self._suspects += 1

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Wait until nobody else runs, suspects one after the other. Only after `announce`."""
        try:
            async with self._turn:
                while self._others:
                    await self._changed.wait()
                yield
        finally:
            self._suspects -= 1
            self._notify()

    @asynccontextmanager
    async def beside_others(self) -> AsyncIterator[None]:
        """Wait while a suspect waits or runs."""
        while self._suspects:
            await self._changed.wait()
        self._others += 1
        try:
            yield
        finally:
            self._others -= 1
            self._notify()

    def _notify(self) -> None:
        changed = self._changed
        self._changed = anyio.Event()
        changed.set()
