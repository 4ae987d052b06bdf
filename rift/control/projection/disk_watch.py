"""Repeat refused writes, and log once when a disk begins to refuse them and once when that ends."""

import logging
from collections.abc import Awaitable, Callable

import anyio

from replay.disk import DiskRefused

logger = logging.getLogger(__name__)

# How often a refused write is repeated.
DISK_RETRY_S = 1.0


class DiskWatch:
    """The refused writes of several writers, each with a name. `subject` begins the messages."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._refused: dict[str, str] = {}

    @property
    def problem(self) -> str | None:
        """The oldest refused write as a sentence, or None."""
        why = next(iter(self._refused.values()), None)
        return None if why is None else f"{self._subject} stopped: {why}"

    async def until_accepted(
        self, name: str, write: Callable[[], Awaitable[None]], retry_s: float = DISK_RETRY_S
    ) -> None:
        """Call `write`, again and again while the disk refuses it. Raises what else `write` raises."""
        while True:
            try:
                await write()
            except DiskRefused as refused:
                self.refused(name, refused)
                await anyio.sleep(retry_s)
            else:
                self.accepted(name)
                return

    def refused(self, name: str, error: DiskRefused) -> None:
        """Note that a write was refused and will be repeated."""
        is_first = not self._refused
        self._refused[name] = str(error)
        if is_first:
            logger.error("%s; it continues once the disk accepts writes", self.problem)

    def accepted(self, name: str) -> None:
        """Note that a write has succeeded."""
        if self._refused.pop(name, None) is not None and not self._refused:
            logger.info("%s continues: the disk accepts writes again", self._subject)

    def clear(self) -> None:
        """Forget the refused writes: they are no longer needed."""
        for name in list(self._refused):
            self.accepted(name)
