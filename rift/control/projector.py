"""The projector's loop: follow every stream from where the warehouse stands, and apply what comes.

What lives here: waiting. What a record means is the fold's business, what is stored the warehouse's.
"""

from collections.abc import AsyncIterable, Iterable, Sequence

import anyio
from anyio import to_thread

from events import subjects
from events.log import Log, Stored
from replay.fold import BookBehind, Stop
from replay.warehouse import Warehouse

# One transaction costs about as much as folding a thousand events, so a busy stream pays for few of
# them; an accepted request is in SQL after about half a second.
PACE_S = 0.5
# What one transaction takes while catching up: about 0.2 s of work, which a question has to wait for.
BATCH_MAX = 2_000
# Messages read ahead of the warehouse, at some kilobytes each.
AHEAD_MAX = 8_000


class LogBehind(Exception):
    """The warehouse has applied what this log does not hold: they do not belong together."""


async def project(log: Log, warehouse: Warehouse, shards: Iterable[int]) -> None:
    """Apply the book, the fleet and every shard, from the applied positions on, until cancelled.

    Raises ProjectionStopped (in an exception group) at a record that cannot be folded, LogBehind.
    """
    followed = {subjects.BOOK: "rift.book.>", subjects.FLEET: "rift.fleet.>"}
    followed |= {subjects.shard_stream(shard): f"rift.{shard}.>" for shard in shards}
    applied = warehouse.positions()
    for stream in followed:
        last = await log.last_sequence(stream)
        if applied.get(stream, 0) > last:
            raise LogBehind(
                f"{stream} ends at {last}, and the database has applied it up to {applied[stream]}: "
                "it was made from another log; delete the database file"
            )
    applying = _Applying(log, warehouse)
    async with anyio.create_task_group() as group:
        for stream, everything in followed.items():
            group.start_soon(_follow, log, applying, stream, everything, applied.get(stream, 0))


async def _follow(log: Log, applying: "_Applying", stream: str, everything: str, after: int) -> None:
    async with (
        log.follow(stream, [everything], after=after, pace_s=PACE_S) as follower,
        anyio.create_task_group() as group,
    ):
        inbox = _Inbox()
        group.start_soon(inbox.fill, follower)
        while True:
            await applying.apply(stream, await inbox.take())


class _Inbox:
    """What was read and not yet applied, bounded."""

    def __init__(self) -> None:
        self._messages: list[Stored] = []
        self._changed = anyio.Condition()

    async def fill(self, follower: AsyncIterable[Sequence[Stored]]) -> None:
        async for messages in follower:
            async with self._changed:
                self._messages.extend(messages)
                self._changed.notify_all()
                while len(self._messages) >= AHEAD_MAX:
                    await self._changed.wait()

    async def take(self) -> Sequence[Stored]:
        """Return the next messages, at least one, once there are any."""
        async with self._changed:
            while not self._messages:
                await self._changed.wait()
            taken, self._messages = self._messages[:BATCH_MAX], self._messages[BATCH_MAX:]
            self._changed.notify_all()
            return taken


class _Applying:
    """The one writer: applies batch by batch in a thread, the book before what was admitted under it."""

    def __init__(self, log: Log, warehouse: Warehouse) -> None:
        self._log = log
        self._warehouse = warehouse
        self._one_at_a_time = anyio.CapacityLimiter(1)
        self._book_grew = anyio.Event()

    async def apply(self, stream: str, messages: Sequence[Stored]) -> None:
        while True:
            book_grew = self._book_grew
            try:
                await to_thread.run_sync(self._warehouse.apply, stream, messages, limiter=self._one_at_a_time)
            except BookBehind as behind:
                await self._check_book(behind)
                await book_grew.wait()
            else:
                break
        if stream == subjects.BOOK:
            self._book_grew.set()
            self._book_grew = anyio.Event()

    async def _check_book(self, behind: BookBehind) -> None:
        """Return if the book's stream holds the position that is waited for, else stop visibly."""
        last = await self._log.last_sequence(subjects.BOOK)
        if last >= behind.book:
            return
        stop = Stop(behind.sequence, f"{behind}; the book ends at {last}")
        await to_thread.run_sync(self._warehouse.stop, behind.stream, stop, limiter=self._one_at_a_time)
