"""A wake-up that can be used again and again: `anyio.Event` stays set, this one does not."""

import anyio


class Wakeup:
    """Wake the tasks that wait for a change.

    A waiter sees only changes after it began to wait. A task that checks a condition, awaits something else
    and then waits must take `pending` before the check, or it can miss a change in between.
    """

    def __init__(self) -> None:
        self._event = anyio.Event()

    @property
    def pending(self) -> anyio.Event:
        """The event that the next `set` sets."""
        return self._event

    def set(self) -> None:
        """Wake every task that waits now."""
        event, self._event = self._event, anyio.Event()
        event.set()

    async def wait(self) -> None:
        """Return at the next `set`."""
        await self._event.wait()
