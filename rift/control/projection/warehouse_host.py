"""The warehouse in use, and its projector: they go on together, and are changed for new ones together."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import anyio
from anyio import to_thread

from events import subjects
from events.log import Log, LogError
from replay.archive.archive import Archive
from replay.warehouse.result import QueryRefused
from replay.warehouse.warehouse import ProjectionStopped, Warehouse
from rift.control.projection.catch_up import fold_tail, rebuilt
from rift.control.projection.projector import Projector

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

# How often a projection that stopped looks at the book.
LOOK_S = 1.0


class Projection:
    """`warehouse` is what questions are asked of; it may be another at the next question."""

    def __init__(
        self, log: Log, database: Path, warehouse: Warehouse, archive: Archive, shards: Iterable[int]
    ) -> None:
        self._log = log
        self._database = database
        self._shards = tuple(shards)
        self.streams = tuple(subjects.folded(self._shards))
        self._archive = archive
        self._use(warehouse)
        self._scope = anyio.CancelScope()
        self._one_at_a_time = anyio.Lock()
        self._switch: anyio.Event | None = None
        # Unset while there is no file to ask.
        self._settled = anyio.Event()

    def _use(self, warehouse: Warehouse) -> None:
        self.warehouse = warehouse
        self._projector = Projector(self._log, warehouse, self._shards)

    @property
    def applied(self) -> Mapping[str, int]:
        """The sequence up to which each stream is applied and committed; a stream not named, none."""
        return self._projector.applied

    async def run(self) -> None:
        """Project until cancelled, from the archive first where the log is trimmed.

        A projection that stopped is logged, and in relation `lag`, and starts again when the book has
        grown: before that it would only stop at the same record.

        Raises LogError, LogBehind, LogTrimmed, ArchiveError, WarehouseError.
        """
        if await self._projector.is_trimmed():
            logger.info("the log is trimmed before what the database holds: it is built from the archive")
            await self._build(_fresh(self._database))
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

    async def _project(self) -> None:
        """Project until it stops, and the book has grown since."""
        try:
            await self._projector.run()
        except* ProjectionStopped as stopped:
            for line in _messages(stopped):
                logger.error("%s", line)
        await self._book_grew()
        self._use(self.warehouse)

    async def _book_grew(self) -> None:
        """Return once the book says more, which may be what a stopped projection waits for: a price, or that
        a record is quarantined."""
        while True:
            with contextlib.suppress(LogError):
                last = await self._log.last_sequence(subjects.BOOK)
                if last > self.warehouse.positions().get(subjects.BOOK, 0):
                    await fold_tail(self._log, self.warehouse, self._shards, until={subjects.BOOK: last})
                    return
            await anyio.sleep(LOOK_S)

    async def catch_up(self) -> bool:
        """Wait until all that is stored by now is applied, within a bound, and say whether it is (see
        `Projector.catch_up`)."""
        projector = None
        caught_up = False
        while projector is not self._projector:
            await self._settled.wait()
            projector = self._projector
            caught_up = await projector.catch_up()
        return caught_up

    async def read(self, read: Callable[[Warehouse], Found]) -> Found:
        """Return what `read` finds once all is applied, in a thread. Raises what it raises."""
        while True:
            await self.catch_up()
            warehouse = self.warehouse
            try:
                return await to_thread.run_sync(read, warehouse)
            except QueryRefused:
                # Or the file was changed for another meanwhile.
                if warehouse is self.warehouse and self._settled.is_set():
                    raise

    async def rebuild(self) -> None:
        """Fold everything again into a fresh file beside the one in use, and go on with that.

        Raises ArchiveError, LogError, LogTrimmed, WarehouseError: then nothing has changed.
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
            await fold_tail(self._log, warehouse, self._shards)
        finally:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(warehouse.close)

    async def _change(self) -> None:
        """Close the file in use, put the fresh one in its place, and open that."""
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(self.warehouse.close)
            remove(self._database)
            os.replace(_fresh(self._database), self._database)
            self._use(await to_thread.run_sync(Warehouse.open, self._database))
            self._settled.set()


def remove(database: Path) -> None:
    """Remove a DuckDB file and what belongs to it, if it is there."""
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
