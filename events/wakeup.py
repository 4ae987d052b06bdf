"""A wake-up that can be used again and again: `anyio.Event` stays set, this one does not."""

import anyio


class Wakeup:
    """Wake the tasks that wait for a change.

    A waiter sees only changes after it began to wait. A task that checks a condition, awaits something else
    and then waits must take `pending` before the check, or it can miss a change in between.
    """

    def __init__(self) -> None:
        # Made only for a waiter: without one, `set` costs nothing.
        self._event: anyio.Event | None = None

    @property
    def pending(self) -> anyio.Event:
        """The event that the next `set` sets."""
        if self._event is None:
            self._event = anyio.Event()
        return self._event

    def set(self) -> None:
        """Wake every task that waits now."""
        if (event := self._event) is not None:
            self._event = None
            event.set()

    async def wait(self) -> None:
        """Return at the next `set`."""
        await self.pending.wait()
