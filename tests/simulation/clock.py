"""An event loop whose time jumps: once all tasks wait, the time becomes that of the next timer.

Hours pass in a second, and the same program takes the same steps at the same times on every run. The loop
has no sockets and no threads. A task that waits for one would wait for ever, so that is an error.
"""

import asyncio
import gc
import selectors
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import anyio
from anyio._backends._asyncio import CancelScope

Result = TypeVar("Result")

WAITS = "all tasks wait, and no timer is set: is there a thread or a socket?"


class Deadlock(RuntimeError):
    """All tasks wait, and no timer is set."""


class TooLong(AssertionError):
    """The program runs past the time at which it should have ended."""


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, *, until_s: float) -> None:
        self.now_s = 0.0
        self._until_s = until_s
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self.now_s

    def jump(self) -> None:
        """Set the time to that of the next timer."""
        moment = self._scheduled[0].when()  # type: ignore[attr-defined]
        if moment == float("inf"):
            raise Deadlock(WAITS)
        self.now_s = max(self.now_s, moment)
        if self.now_s > self._until_s:
            self._until_s = float("inf")
            raise TooLong(f"{self.now_s:.0f} s have passed, and the program still runs")


class _Jump(selectors.SelectSelector):
    """The loop's wait for sockets, replaced by a jump."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Deadlock(WAITS)
        if timeout > 0:
            self._loop.jump()
        return []


class _Ordered(dict[Any, None]):
    """A set that iterates in insertion order."""

    def add(self, item: Any) -> None:
        self[item] = None

    def discard(self, item: Any) -> None:
        self.pop(item, None)

    def remove(self, item: Any) -> None:
        del self[item]


@contextmanager
def _in_order() -> Iterator[None]:
    """Make runs independent of memory addresses.

    They would decide in which order a scope cancels its tasks (anyio keeps them in sets), and when a garbage
    collection ends generators.
    """
    original = CancelScope.__init__

    def init(self: CancelScope, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        self._child_scopes, self._tasks = _Ordered(), _Ordered()  # type: ignore[assignment]

    CancelScope.__init__ = init  # type: ignore[method-assign]
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        CancelScope.__init__ = original  # type: ignore[method-assign]
        if was_collecting:
            gc.enable()


def run(main: Callable[[], Awaitable[Result]], *, until_s: float = 3600.0) -> Result:
    """Run a program to its end without waiting. Raises TooLong after `until_s` of virtual time."""
    options = {"loop_factory": lambda: VirtualLoop(until_s=until_s)}
    with _in_order():
        return anyio.run(main, backend="asyncio", backend_options=options)
