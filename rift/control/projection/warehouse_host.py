"""The warehouse in use and its projector. A rebuild replaces both together."""

import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
from anyio import to_thread

from events import fleet, subjects
from events.log import Log, LogError
from replay.archive.archive import Archive
from replay.sql_files import sql
from replay.warehouse.queries import Question
from replay.warehouse.result import QueryRefused, QueryResult
from replay.warehouse.warehouse import ProjectionStopped, Warehouse
from rift.control.projection.catch_up import fold_tail, rebuilt
from rift.control.projection.disk_watch import DISK_RETRY_S, DiskWatch
from rift.control.projection.projector import Projector
from rift.rpc import ProjectionBlocked

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Answers SQL with its parameters, each as a `replay.warehouse.queries.Question`. Raises QueryRefused.
Query = Callable[..., Awaitable[list[QueryResult]]]

# Why a bill is refused although the disk accepts writes.
INCOMPLETE = (
    "the answer would lack stored records: the projection has not applied them yet, or stopped at one of "
    "them, which `rift status` names"
)

# How often a stopped projection checks whether the book has grown.
BOOK_POLL_S = 1.0

# How often a question that waits for a file checks whether the disk refuses it.
SETTLE_POLL_S = 0.2

# A build that ran out of space is repeated this often: it costs minutes of a core.
BUILD_RETRY_S = 10.0


class Projection:
    """`warehouse` may be another object after every await: a rebuild replaces it. `streams` maps each stream
    to the subjects that are projected; shards that are opened later are added.

    While the disk of the database is full or read-only, the projection waits and repeats what was refused. An
    answer that would lack records then raises ProjectionBlocked; a bill does so for any other reason too.
    """

    def __init__(self, log: Log, database: Path, warehouse: Warehouse, archive: Archive) -> None:
        self._log = log
        self._database = database
        self.streams = subjects.folded([0])
        self._archive = archive
        self._disk = DiskWatch("the projection")
        self._use(warehouse)
        self._scope = anyio.CancelScope()
        self._one_at_a_time = anyio.Lock()
        self._switch: anyio.Event | None = None
        # Set while there is a file to query.
        self._settled = anyio.Event()

    def _use(self, warehouse: Warehouse) -> None:
        self.warehouse = warehouse
        self._projector = Projector(self._log, warehouse, self.streams, self._disk)

    @property
    def applied(self) -> Mapping[str, int]:
        """The sequence up to which each stream is applied and committed; a missing stream has none."""
        return self._projector.applied

    @property
    def is_stopped(self) -> bool:
        """Whether nothing is applied now, because a record cannot be folded."""
        return self._projector.is_stopped

    @property
    def problem(self) -> str | None:
        """Why the projection waits for its disk, as a sentence, or None."""
        return self._disk.problem

    async def run(self) -> None:
        """Project until cancelled; first rebuild from the archive if the log was trimmed.

        A stopped projection is logged and shown in relation `lag`. It starts again once the book has grown:
        before that it would stop at the same record.

        Raises LogError, LogBehind, LogTrimmed, ArchiveError, WarehouseError.
        """
        await self._projector.find_shards()
        await self._disk.until_accepted("the file", self._open)
        if await self._is_to_rebuild():
            logger.info("the database lacks records that only the archive holds: rebuilding from it")
            await self._disk.until_accepted(
                "a fresh file", partial(self._build, _fresh(self._database)), BUILD_RETRY_S
            )
            await self._change()
        self._settled.set()
        while True:
            if self._switch is None:
                with anyio.CancelScope() as self._scope:
                    await self._project()
            if self._switch is not None:
                self._settled = anyio.Event()
                await self._change()
                self._switch.set()
                self._switch = None

    async def _is_to_rebuild(self) -> bool:
        """Return whether the database must begin with the archive: the log was trimmed past its positions, or
        it is empty. A log that was restored lacks requests that its archive holds."""
        if await self._projector.is_trimmed():
            return True
        return not self._projector.applied and bool(await to_thread.run_sync(self._archive.streams))

    async def _open(self) -> None:
        await to_thread.run_sync(self.warehouse.ensure_open)
        self._use(self.warehouse)

    async def _project(self) -> None:
        """Project until a record stops the projection, then wait until the book has grown."""
        try:
            await self._projector.run()
        except* ProjectionStopped as stopped:
            for line in _messages(stopped):
                logger.error("%s", line)
        await self._book_grew()
        self._use(self.warehouse)

    async def _book_grew(self) -> None:
        """Return once the book has grown: it may hold the price that a stopped projection needs, or
        quarantine its record."""
        while True:
            with contextlib.suppress(LogError):
                last = await self._log.last_sequence(subjects.BOOK)
                if last > self.warehouse.positions().get(subjects.BOOK, 0):
                    fold_book = partial(fold_tail, self._log, self.warehouse, until={subjects.BOOK: last})
                    await self._disk.until_accepted(subjects.BOOK, fold_book)
                    return
            await anyio.sleep(BOOK_POLL_S)

    async def catch_up(self) -> bool:
        """As `Projector.catch_up`, on the projector in use at the end."""
        projector = None
        caught_up = False
        while projector is not self._projector:
            if not await self._is_settled():
                return False
            projector = self._projector
            caught_up = await projector.catch_up()
        return caught_up

    async def _is_settled(self) -> bool:
        """Wait for a file to query; return False if the disk refuses it."""
        while not self._settled.is_set():
            if self.problem is not None:
                return False
            with anyio.move_on_after(SETTLE_POLL_S):
                await self._settled.wait()
        return True

    async def read(
        self, read: Callable[[Warehouse], Result], *, catch_up: bool = True, is_bill: bool = False
    ) -> Result:
        """Return the result of `read`, called in a thread after `catch_up`.

        Raises what `read` raises, and ProjectionBlocked if the disk refuses writes and either records are
        missing after `catch_up` or the file is not open. For a bill, raises it if records are missing after
        `catch_up` for any reason: its reader could not see that in a total.
        """
        while True:
            is_complete = not catch_up or await self.catch_up()
            if not is_complete and (is_bill or self.problem is not None):
                raise ProjectionBlocked(self.problem or INCOMPLETE)
            warehouse = self.warehouse
            try:
                return await to_thread.run_sync(read, warehouse)
            except QueryRefused as refused:
                if not warehouse.is_open and self.problem is not None:
                    raise ProjectionBlocked(self.problem) from refused
                # A rebuild may have closed the file.
                if warehouse is self.warehouse and self._settled.is_set():
                    raise
                await self._is_settled()

    async def query(self, *questions: Question) -> list[QueryResult]:
        """Answer SQL from the warehouse as it is, all as of one moment.

        Waits while the disk refuses the file, which the log names once. Raises QueryRefused.
        """
        while True:
            with contextlib.suppress(ProjectionBlocked):
                return await self.read(lambda warehouse: warehouse.read(*questions), catch_up=False)
            await anyio.sleep(DISK_RETRY_S)

    async def first_open(self, stream: str) -> int:
        """Return a sequence of a shard at or before every open request: the log's first one while the
        database cannot be opened. Raises QueryRefused, LogError."""

        def read(warehouse: Warehouse) -> int:
            # Read first: a request that is accepted meanwhile has a later sequence.
            after = warehouse.positions().get(stream, 0) + 1
            [result] = warehouse.read((sql("control/first_open"), {"stream": stream}))
            [[first]] = result.rows
            return after if first is None else min(int(first), after)

        try:
            return await self.read(read, catch_up=False)
        except ProjectionBlocked:
            return await self._log.first_sequence(stream)

    async def needed_from(self, stream: str) -> int:
        """Return the first sequence that a reader may still need: an open request's or a live replica's.

        Raises LogError, QueryRefused.
        """
        if stream == subjects.FLEET:
            return (await fleet.read(self._log)).needed_from
        return await self.first_open(stream)

    def quarantined(self, stream: str) -> Container[int]:
        """Return the sequences of a stream's quarantined records."""
        return self.warehouse.quarantined(stream)

    async def rebuild(self) -> None:
        """Build a fresh file from the archive and the log while the one in use answers, then switch to it.

        Raises ArchiveError, LogError, LogTrimmed, WarehouseError, DiskRefused, and then nothing has changed.
        """
        # The start may build the same file.
        await self._settled.wait()
        async with self._one_at_a_time:
            fresh = _fresh(self._database)
            try:
                await self._build(fresh)
                self._switch = anyio.Event()
                self._scope.cancel()
                await self._switch.wait()
            finally:
                remove(fresh)

    async def _build(self, fresh: Path) -> None:
        remove(fresh)
        warehouse = await rebuilt(self._log, self._archive, fresh)
        try:
            await fold_tail(self._log, warehouse)
            await to_thread.run_sync(warehouse.checkpoint)
        finally:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(warehouse.close)

    async def _change(self) -> None:
        """Close the file in use, put the fresh one in its place, and open that."""
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(self.warehouse.close)
            remove(self._database)
            os.replace(_fresh(self._database), self._database)
            self.warehouse = type(self.warehouse)(self._database)
        await self._disk.until_accepted("the file", self._open)
        self._disk.clear()
        self._settled.set()


def remove(database: Path) -> None:
    """Remove a DuckDB file, if it exists, and the files that belong to it."""
    for suffix in ("", ".wal", ".part", ".part.wal"):
        database.with_name(f"{database.name}{suffix}").unlink(missing_ok=True)


def _fresh(database: Path) -> Path:
    return database.with_name(f"{database.name}.rebuilding")


def _messages(group: BaseExceptionGroup[ProjectionStopped]) -> Iterable[str]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _messages(error)
        else:
            yield str(error)
