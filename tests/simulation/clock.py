"""An event loop whose time jumps: as soon as everything waits, it is the next timer's moment.

So hours pass in a second, nothing waits for the machine, and the same program takes the same steps at
the same moments, every time. There are no sockets and no threads on this loop: who waits for one waits for
something that never comes, which is an error here and not a hang.
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

WAITS = "everything waits, and no timer is set: is there a thread or a socket?"


class Deadlock(RuntimeError):
    """Everything waits, and no timer is set."""


class TooLong(AssertionError):
    """The program is not over at a moment at which it should be."""


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, *, until_s: float) -> None:
        self.now_s = 0.0
        self._until_s = until_s
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self.now_s

    def jump(self) -> None:
        """Go to the next timer's moment."""
        moment = self._scheduled[0].when()  # type: ignore[attr-defined]
        if moment == float("inf"):
            raise Deadlock(WAITS)
        self.now_s = max(self.now_s, moment)
        if self.now_s > self._until_s:
            self._until_s = float("inf")
            raise TooLong(f"{self.now_s:.0f} s have passed, and it is not over")


class _Jump(selectors.SelectSelector):
    """Where a loop waits for sockets; this one does not wait."""

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
    """A set that is walked in the order in which it was filled."""

    def add(self, item: Any) -> None:
        self[item] = None

    def discard(self, item: Any) -> None:
        self.pop(item, None)

    def remove(self, item: Any) -> None:
        del self[item]


@contextmanager
def _in_order() -> Iterator[None]:
    """Let nothing depend on where objects lie in memory: not the order in which a scope cancels its tasks
    (anyio keeps them in sets), and not the moment of a garbage collection (which ends generators)."""
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
    """Run a program to its end, in no time. Raises TooLong past `until_s` of its own time."""
    options = {"loop_factory": lambda: VirtualLoop(until_s=until_s)}
    with _in_order():
        return anyio.run(main, backend="asyncio", backend_options=options)
