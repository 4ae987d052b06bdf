"""The projector: follow every stream from the warehouse's positions and apply each batch.

This module only schedules. The fold defines what a record means, and the warehouse what is stored.
"""

import logging
from collections.abc import AsyncIterable, Mapping, Sequence
from contextlib import suppress

import anyio
from anyio import to_thread

from events import shards, subjects
from events.log import Follower, Log, LogError, Stored
from events.wakeup import Wakeup
from replay.disk import DiskRefused
from replay.facts.fold import BookBehind, Stop
from replay.warehouse.warehouse import Warehouse
from rift.control.projection.disk_watch import DISK_RETRY_S, DiskWatch
from rift.errors import RiftError, first_error

# A transaction costs about as much as folding a thousand events, and writes the row of each open request that
# its records have changed, so a busy stream should need few of them. A question does not wait for the pace:
# see `catch_up`.
PACE_S = 3.0
# How long a question waits for records that were stored before it: less than a client of `/v1/usage` waits
# for its answer. Then a bill is refused, and another question is answered from the applied ones, and relation
# `lag` shows how much is missing.
CATCH_UP_S = 4.0
# A stream that does not answer is asked again after this time.
LOG_RETRY_S = 1.0
# Records of one transaction while catching up: about 0.2 s of work, for which a question has to wait.
BATCH_MAX = 2_000
# Records read ahead of the warehouse, at some kilobytes each.
AHEAD_MAX = 8_000


logger = logging.getLogger(__name__)


class LogBehind(RiftError):
    """The warehouse has applied records that this log does not hold: they do not belong together."""


class LogTrimmed(RiftError):
    """The log no longer holds the record that the warehouse has to apply next."""


class Projector:
    """While the disk refuses a batch, the projector repeats it, and `disk` notes that. `streams` maps each
    stream to its subjects; the projector adds the shards that are opened while it runs."""

    def __init__(
        self, log: Log, warehouse: Warehouse, streams: dict[str, str], disk: DiskWatch | None = None
    ) -> None:
        self._log = log
        self._writer = _Writer(log, warehouse, disk or DiskWatch("the projection"))
        self._streams = streams
        self._readers: dict[str, Follower] = {}
        self._stopped = False
        # The heads that relation `lag` shows. None: unknown, an earlier process may have written some.
        self._heads: dict[str, tuple[int, int]] | None = None
        self._gave_up_at: anyio.Event | None = None

    @property
    def applied(self) -> Mapping[str, int]:
        """The sequence up to which each stream is applied and committed; a missing stream has none."""
        return self._writer.applied

    @property
    def is_stopped(self) -> bool:
        return self._stopped

    async def find_shards(self) -> None:
        """Add the shards that are open. Raises LogError."""
        self._streams.update(subjects.folded(range(await shards.count(self._log))))

    async def run(self) -> None:
        """Apply the book, the fleet and every shard from the applied positions on, until cancelled.

        Raises ProjectionStopped (in an exception group) at a record that cannot be folded, LogBehind,
        LogTrimmed.
        """
        for stream in self._streams:
            # One that does not answer now is checked before it is followed.
            with suppress(LogError):
                await self._check(stream, self.applied.get(stream, 0))
        try:
            async with anyio.create_task_group() as group:

                def opened(shard: int) -> None:
                    stream, stream_subjects = subjects.shard_stream(shard), subjects.of_shard(shard)
                    self._streams[stream] = stream_subjects
                    self._writer.changed.set()
                    group.start_soon(self._follow, stream, stream_subjects)

                for stream, stream_subjects in self._streams.items():
                    group.start_soon(self._follow, stream, stream_subjects)
                known = len(self._streams.keys() - {subjects.FLEET, subjects.BOOK})
                group.start_soon(shards.follow, self._log, known, opened)
        finally:
            self._stopped = True
            self._writer.changed.set()

    async def is_trimmed(self) -> bool:
        """Return whether the log lacks a record that has to be applied next."""
        for stream in self._streams:
            # `run` checks it too.
            with suppress(LogError):
                if self.applied.get(stream, 0) + 1 < await self._log.first_sequence(stream):
                    return True
        return False

    async def _check(self, stream: str, applied: int) -> None:
        """Raise LogBehind or LogTrimmed if the log does not continue the warehouse: a reader would wait for
        ever, or skip the gap."""
        last = await self._log.last_sequence(stream)
        first = await self._log.first_sequence(stream)
        if applied > last:
            raise LogBehind(
                f"{stream} ends at {last}, but the database has applied it up to {applied}, so it was made "
                "from another log: restore both from one backup"
            )
        if applied + 1 < first:
            raise LogTrimmed(
                f"{stream} begins at {first}, but the database has applied it only up to {applied}: the "
                "records between them were trimmed and are in the archive; run `rift replay --rebuild`"
            )

    async def catch_up(self) -> bool:
        """Wait until every record that is stored now is applied, and return whether it is.

        Waits at most CATCH_UP_S. After that, further calls return at once until something is applied.
        """
        if self._gave_up_at is self._writer.changed.pending:
            return False
        try:
            with anyio.move_on_after(CATCH_UP_S) as timer:
                newest = subjects.shard_stream(await shards.count(self._log) - 1)
                while not self._stopped and newest not in self._streams:
                    await self._writer.changed.wait()
                for stream in list(self._streams):
                    last = await self._log.last_sequence(stream)
                    while not self._stopped and self.applied.get(stream, 0) < last:
                        if (reader := self._readers.get(stream)) is not None:
                            reader.hurry()
                        await self._writer.changed.wait()
            is_complete = not timer.cancelled_caught and not self._stopped
            await self._note_heads({} if is_complete else await self._behind())
        except LogError:
            # The answer is as old as the log's silence.
            return False
        if timer.cancelled_caught:
            self._gave_up_at = self._writer.changed.pending
        return is_complete

    async def _behind(self) -> dict[str, tuple[int, int]]:
        """Return the last sequence and stored time of each stream that is not applied to its end."""
        heads = {}
        for stream, stream_subjects in list(self._streams.items()):
            last = await self._log.last(stream, stream_subjects)
            if last is not None and last.sequence > self.applied.get(stream, 0):
                heads[stream] = last.sequence, last.stored_at_ns
        return heads

    async def _note_heads(self, heads: dict[str, tuple[int, int]]) -> None:
        """Write to relation `lag` which streams are behind."""
        if heads != self._heads:
            # If the disk refuses that, the next question tries again.
            with suppress(DiskRefused):
                await self._writer.note_heads(heads)
                self._heads = heads

    async def _follow(self, stream: str, stream_subjects: str) -> None:
        """Apply a stream. One that does not answer is asked again, so that the others go on meanwhile."""
        while True:
            try:
                await self._check(stream, self.applied.get(stream, 0))
                await self._read(stream, stream_subjects)
            except* LogError as silent:
                logger.warning("%s is not projected yet: %s", stream, first_error(silent))
            await anyio.sleep(LOG_RETRY_S)

    async def _read(self, stream: str, stream_subjects: str) -> None:
        after = self.applied.get(stream, 0)
        async with (
            self._log.follow(stream, [stream_subjects], after=after, pace_s=PACE_S) as reader,
            anyio.create_task_group() as group,
        ):
            self._readers[stream] = reader
            inbox = _Inbox()
            group.start_soon(inbox.fill, reader)
            while True:
                messages = await inbox.next_batch()
                await self._check_gap(stream, messages[0].sequence)
                await self._writer.apply(stream, messages)

    async def _check_gap(self, stream: str, first: int) -> None:
        """Raise LogTrimmed after a gap at the log's beginning: another leader may trim while this process is
        frozen."""
        applied = self.applied.get(stream, 0)
        if applied + 1 < first and applied + 1 < await self._log.first_sequence(stream):
            raise LogTrimmed(
                f"{stream} was trimmed up to {first - 1} while this process was not reading, and the "
                f"database has applied it up to {applied}: restart control, and it will be rebuilt from the "
                "archive"
            )


class _Inbox:
    """A bounded queue of records that were read but not applied."""

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

    async def next_batch(self) -> Sequence[Stored]:
        """Wait for records and return up to BATCH_MAX of them."""
        async with self._changed:
            while not self._messages:
                await self._changed.wait()
            batch = self._messages[:BATCH_MAX]
            self._messages = self._messages[BATCH_MAX:]
            self._changed.notify_all()
            return batch


class _Writer:
    """The only writer of the warehouse. It applies one batch at a time in a thread, and the book before the
    requests that were admitted under it. `changed` wakes its waiters whenever `applied` grows."""

    def __init__(self, log: Log, warehouse: Warehouse, disk: DiskWatch) -> None:
        self.applied = dict(warehouse.positions())
        self.changed = Wakeup()
        self._log = log
        self._warehouse = warehouse
        self._disk = disk
        self._one_at_a_time = anyio.CapacityLimiter(1)
        self._book_grew = Wakeup()

    async def apply(self, stream: str, messages: Sequence[Stored]) -> None:
        while True:
            book_grew = self._book_grew.pending
            try:
                await to_thread.run_sync(self._warehouse.apply, stream, messages, limiter=self._one_at_a_time)
            except BookBehind as behind:
                await self._check_book(behind)
                await book_grew.wait()
            except DiskRefused as refused:
                self._disk.refused(stream, refused)
                await anyio.sleep(DISK_RETRY_S)
            else:
                break
        self._disk.accepted(stream)
        if stream == subjects.BOOK:
            self._book_grew.set()
        self.applied[stream] = messages[-1].sequence
        self.changed.set()

    async def note_heads(self, heads: Mapping[str, tuple[int, int]]) -> None:
        await to_thread.run_sync(self._warehouse.note_heads, heads, limiter=self._one_at_a_time)

    async def _check_book(self, behind: BookBehind) -> None:
        """Stop the stream visibly unless the log's book holds the position that a request names."""
        last = await self._log.last_sequence(subjects.BOOK)
        if last >= behind.book:
            return
        stop = Stop(behind.sequence, f"{behind}; the book ends at {last}")
        await to_thread.run_sync(self._warehouse.stop, behind.stream, stop, limiter=self._one_at_a_time)
