"""One way to keep a fold current with a stream: read what is there, or follow it for ever."""

from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from events.log import Follower, Log, Stored


class Fold(Protocol):
    """State that is computed from a stream's records in their order."""

    @property
    def position(self) -> int:
        """The last sequence that was folded."""

    def fold(self, stored: Stored) -> Any:
        """Apply one record. Raises codec.RecordUnreadable if the fold must not pass over it."""


async def read(log: Log, stream: str, subjects: Sequence[str], fold: Fold) -> None:
    """Fold everything the stream holds now, after `fold.position`. Raises LogError and what `fold` raises."""
    target = await log.last_sequence(stream)
    async with aclosing(log.scan(stream, subjects, first=fold.position + 1, target=target)) as batches:
        async for batch in batches:
            for stored in batch:
                fold.fold(stored)


async def follow(
    log: Log,
    stream: str,
    subjects: Sequence[str],
    fold: Fold,
    *,
    changed: Callable[[], None] = lambda: None,
) -> None:
    """Fold each record after `fold.position` as it is stored, until cancelled.

    Calls `changed` after each batch. Raises LogError and what `fold` raises.
    """
    async with log.follow(stream, subjects, after=fold.position) as reader:
        await drain(reader, fold, changed=changed)


async def drain(reader: Follower, fold: Fold, *, changed: Callable[[], None]) -> None:
    """As `follow`, for a reader that is open already."""
    async for batch in reader:
        for stored in batch:
            fold.fold(stored)
        changed()
