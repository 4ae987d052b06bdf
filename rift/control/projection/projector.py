"""The projector's loop: follow every stream from where the warehouse stands, and apply what comes.

What lives here: waiting. What a record means is the fold's business, what is stored the warehouse's.
"""

from collections.abc import AsyncIterable, Iterable, Mapping, Sequence

import anyio
from anyio import to_thread

from events import subjects
from events.log import Follower, Log, LogError, Stored
from replay.facts.fold import BookBehind, Stop
from replay.warehouse.warehouse import Warehouse
from rift.errors import RiftError

# One transaction costs about as much as folding a thousand events, so a busy stream pays for few of them.
# Who asks does not wait for it: see `catch_up`.
PACE_S = 1.0
# How long a question waits for what was stored before it. Then it is answered from what there is, and
# relation `lag` says how much is missing.
CATCH_UP_S = 2.0
# What one transaction takes while catching up: about 0.2 s of work, which a question has to wait for.
BATCH_MAX = 2_000
# Messages read ahead of the warehouse, at some kilobytes each.
AHEAD_MAX = 8_000


class LogBehind(RiftError):
    """The warehouse has applied what this log does not hold: they do not belong together."""


class LogTrimmed(RiftError):
    """The log no longer holds what the warehouse has to apply next."""


class Projector:
    def __init__(self, log: Log, warehouse: Warehouse, shards: Iterable[int]) -> None:
        self._log = log
        self._applying = _Applying(log, warehouse)
        self._subjects = subjects.folded(shards)
        self._readers: dict[str, Follower] = {}
        self._stopped = False
        # Until told otherwise: an earlier process may have said that something is missing.
        self._heads: dict[str, tuple[int, int]] | None = None
        self._gave_up_at: anyio.Event | None = None

    @property
    def applied(self) -> Mapping[str, int]:
        """The sequence up to which each stream is applied and committed; a stream not named, none."""
        return self._applying.applied

    async def run(self) -> None:
        """Apply the book, the fleet and every shard, from the applied positions on, until cancelled.

        Raises ProjectionStopped (in an exception group) at a record that cannot be folded, LogBehind,
        LogTrimmed.
        """
        for stream in self._subjects:
            await self._check(stream, self._applying.applied.get(stream, 0))
        try:
            async with anyio.create_task_group() as group:
                for stream, everything in self._subjects.items():
                    group.start_soon(self._follow, stream, everything)
        finally:
            self._stopped = True
            self._applying.changed.set()

    async def is_trimmed(self) -> bool:
        """Say whether the log no longer holds what has to be applied next."""
        for stream in self._subjects:
            if self._applying.applied.get(stream, 0) + 1 < await self._log.first_sequence(stream):
                return True
        return False

    async def _check(self, stream: str, applied: int) -> None:
        """Raises LogBehind, LogTrimmed: a reader would wait for ever, or go on behind the gap."""
        last = await self._log.last_sequence(stream)
        first = await self._log.first_sequence(stream)
        if applied > last:
            raise LogBehind(
                f"{stream} ends at {last}, and the database has applied it up to {applied}: "
                "it was made from another log; delete the database file"
            )
        if applied + 1 < first:
            raise LogTrimmed(
                f"{stream} begins at {first}, and the database has applied it up to {applied}: what is "
                "between them was trimmed and is in the archive; run `rift replay --rebuild`"
            )

    async def catch_up(self) -> bool:
        """Wait until all that is stored by now is applied, for CATCH_UP_S at most; and not again, as long as
        nothing is applied at all. Say whether it is."""
        if self._gave_up_at is self._applying.changed:
            return False
        try:
            with anyio.move_on_after(CATCH_UP_S) as timer:
                for stream in self._subjects:
                    last = await self._log.last_sequence(stream)
                    while not self._stopped and self._applying.applied.get(stream, 0) < last:
                        changed = self._applying.changed
                        if (reader := self._readers.get(stream)) is not None:
                            reader.hurry()
                        await changed.wait()
            await self._note_heads()
        except LogError:
            # The answer is as old as the log's silence.
            return False
        if timer.cancelled_caught:
            self._gave_up_at = self._applying.changed
        return not timer.cancelled_caught and not self._stopped

    async def _note_heads(self) -> None:
        """Say in relation `lag` what could not be waited for, or that nothing is missing."""
        heads = {}
        for stream, everything in self._subjects.items():
            last = await self._log.last(stream, everything)
            if last is not None and last.sequence > self._applying.applied.get(stream, 0):
                heads[stream] = last.sequence, last.stored_at_ns
        if heads != self._heads:
            await self._applying.note_heads(heads)
        self._heads = heads

    async def _follow(self, stream: str, everything: str) -> None:
        after = self._applying.applied.get(stream, 0)
        async with (
            self._log.follow(stream, [everything], after=after, pace_s=PACE_S) as reader,
            anyio.create_task_group() as group,
        ):
            self._readers[stream] = reader
            inbox = _Inbox()
            group.start_soon(inbox.fill, reader)
            while True:
                messages = await inbox.take()
                self._check_gap(stream, messages[0].sequence)
                await self._applying.apply(stream, messages)

    def _check_gap(self, stream: str, first: int) -> None:
        """Raises LogTrimmed: who was frozen for long may find that others went on without it."""
        if (applied := self._applying.applied.get(stream, 0)) + 1 < first:
            raise LogTrimmed(
                f"{stream} was trimmed up to {first - 1} while this process was away, and the database has "
                f"applied it up to {applied}: start it again, and it is built from the archive"
            )


class _Inbox:
    """What was read and not yet applied, bounded."""

    def __init__(self) -> None:
        self._messages: list[Stored] = []
        self._changed = anyio.Condition()

    async def fill(self, reader: AsyncIterable[Sequence[Stored]]) -> None:
        async for messages in reader:
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
            taken = self._messages[:BATCH_MAX]
            self._messages = self._messages[BATCH_MAX:]
            self._changed.notify_all()
            return taken


class _Applying:
    """The one writer: applies batch by batch in a thread, the book before what was admitted under it.

    `applied` is how far each stream is; `changed` is set, and replaced, whenever that changes.
    """

    def __init__(self, log: Log, warehouse: Warehouse) -> None:
        self.applied = dict(warehouse.positions())
        self.changed = anyio.Event()
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
        self.applied[stream] = messages[-1].sequence
        self.changed.set()
        self.changed = anyio.Event()

    async def note_heads(self, heads: Mapping[str, tuple[int, int]]) -> None:
        await to_thread.run_sync(self._warehouse.note_heads, heads, limiter=self._one_at_a_time)

    async def _check_book(self, behind: BookBehind) -> None:
        """Return if the book's stream holds the position that is waited for, else stop visibly."""
        last = await self._log.last_sequence(subjects.BOOK)
        if last >= behind.book:
            return
        stop = Stop(behind.sequence, f"{behind}; the book ends at {last}")
        await to_thread.run_sync(self._warehouse.stop, behind.stream, stop, limiter=self._one_at_a_time)
