"""Which requests run together: a suspect runs alone, everything else concurrently.

A suspect is a request that may have killed an engine. If it kills another, no other request dies with it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from events.lifecycle import Life, deaths
from events.schema import Problem
from events.wakeup import Wakeup

# After this many attempts whose worker died, the request itself is taken for the cause and is refused.
DEATHS_MAX = 3
# From this many deaths on, or once an engine was seen to die, a request is a suspect.
SUSPECT_DEATHS = 2
POISON = Problem(code="poison", message="three engines ended under this request; it is not tried again")


def is_suspect(life: Life) -> bool:
    """Return whether the request may be the cause of its engines' deaths."""
    return life.released == "lost" or deaths(life) >= SUSPECT_DEATHS


def is_poison(life: Life) -> bool:
    return deaths(life) >= DEATHS_MAX


class Isolation:
    def __init__(self) -> None:
        self._suspects = 0
        self._others = 0
        self._turn = anyio.Lock()
        self._changed = Wakeup()

    @property
    def is_requested(self) -> bool:
        """A suspect waits or runs, so no other job should be fetched."""
        return self._suspects > 0

    def request(self) -> None:
        """Keep other requests from starting. Call it before `alone`."""
        self._suspects += 1

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Wait until nothing else runs; suspects take turns."""
        try:
            async with self._turn:
                while self._others:
                    await self._changed.wait()
                yield
        finally:
            self._suspects -= 1
            self._changed.set()

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Wait while a suspect waits or runs."""
        while self._suspects:
            await self._changed.wait()
        self._others += 1
        try:
            yield
        finally:
            self._others -= 1
            self._changed.set()
