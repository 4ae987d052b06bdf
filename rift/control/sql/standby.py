"""The database of the SQL process, which follows the log."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import anyio
from anyio import to_thread

from events.contracts import SQL_CATCH_UP_S
from events.jetstream import JetStream, connect
from replay.archive import parquet
from replay.archive.archive import Archive
from replay.disk import DiskRefused, naming
from replay.warehouse.warehouse import CONFIG, Warehouse, WarehouseBusy, WarehouseError, WarehouseOutdated
from rift.control.projection.warehouse_host import Projection, remove
from rift.control.sql.frames import SqlSetup
from rift.rpc import QuestionRefused

logger = logging.getLogger(__name__)

# How often a question looks again whether everything is applied.
POLL_S = 0.05


class SqlWarehouse(Warehouse):
    """DuckDB's part of the memory is below the process's, so that a large sort spills instead of failing. It
    may spill little: the disk belongs to the log."""

    config: ClassVar[parquet.Config] = CONFIG | {
        "threads": 1,
        "memory_limit": "1GB",
        "max_temp_directory_size": "1GB",
    }


class Standby:
    """The database of this process, and the task that follows the log into it.

    `is_idle` after an answer, until the next question. A failure then ends the process at once, so that the
    next question starts a new one. At any other time a question is told the reason: the first one starts the
    process, so it always comes.
    """

    def __init__(self, setup: SqlSetup) -> None:
        self.is_idle = False
        self._setup = setup
        self._log: JetStream | None = None
        self._projection: Projection | None = None
        self._failure: Exception | None = None

    @property
    def warehouse(self) -> Warehouse:
        assert self._projection is not None, "caught up before"
        return self._projection.warehouse

    @property
    def failed(self) -> bool:
        return self._failure is not None

    async def run(self) -> None:
        """Follow the log until something fails."""
        try:
            self._log = await connect(self._setup.url, self._setup.access, name="sql")
            await self._follow(self._log)
        except Exception as error:  # the next question is told, or starts another process
            self._failure = error
            logger.exception("the SQL database cannot follow the log")
            if self.is_idle:
                os._exit(1)

    async def _follow(self, log: JetStream) -> None:
        setup = self._setup
        database = Path(setup.database)
        warehouse = await to_thread.run_sync(_opened, database)
        for stream, applied in warehouse.positions().items():
            if applied > await log.last_sequence(stream):
                logger.warning("%s was made from another log: it is built again", database)
                await to_thread.run_sync(warehouse.close)
                remove(database)
                warehouse = await to_thread.run_sync(_opened, database)
                break
        archive = Archive(Path(setup.archive), key=setup.archive_key)
        self._projection = Projection(log, database, warehouse, archive)
        await self._projection.run()

    async def catch_up(self) -> None:
        """Return once every record that is stored now is applied. Return earlier if a record stops the
        projection, or if the log is silent: relation `lag` shows what is missing.

        Raises QuestionRefused, or what `run` failed with.
        """
        with anyio.move_on_after(SQL_CATCH_UP_S):
            while True:
                if self._failure is not None:
                    raise self._failure
                if (projection := self._projection) is not None:
                    if await projection.catch_up():
                        return
                    if projection.problem is not None:
                        raise QuestionRefused(projection.problem)
                    if self._failure is None and (projection.is_stopped or not _is_connected(self._log)):
                        return
                await anyio.sleep(POLL_S)
        raise QuestionRefused(await self._progress())

    async def _progress(self) -> str:
        applied = total = 0
        if self._projection is not None and self._log is not None:
            applied = sum(self._projection.applied.values())
            for stream in self._projection.streams:
                total += await self._log.last_sequence(stream)
        return (
            f"the SQL database is being built: {applied:,} of {total:,} records are applied; ask again in a "
            "minute"
        )


def _is_connected(log: JetStream | None) -> bool:
    return log is not None and log.is_connected


def _opened(database: Path) -> Warehouse:
    """Open the database. The log holds everything in it, so an unusable file is replaced. The projection
    opens it later if the disk is full or read-only.

    Raises WarehouseError.
    """
    warehouse = SqlWarehouse(database)
    with suppress(DiskRefused):
        try:
            warehouse.ensure_open()
        except WarehouseBusy:
            raise
        except WarehouseError as error:
            why = "another version of Rift made it" if isinstance(error, WarehouseOutdated) else error
            logger.warning("%s is built again: %s", database, why)
            with naming(database):
                remove(database)
            warehouse.ensure_open()
    return warehouse
