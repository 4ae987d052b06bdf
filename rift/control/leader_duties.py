"""The duties of a leader, built and run together for one epoch."""

import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import msgspec

from events import shards
from events.log import Log, LogError
from replay.archive.archive import Archive
from rift.control.config import ControlConfig
from rift.control.duties.archiver import Archiver
from rift.control.duties.autoscaler import Autoscaler
from rift.control.duties.credit_settlement import CreditSettlement
from rift.control.duties.janitor import Janitor
from rift.control.duties.key_erasure import KeyErasure
from rift.control.duties.usage_correction import UsageCorrection
from rift.control.projection.warehouse_host import Projection
from rift.control.rpc.handlers import Handlers
from rift.control.rpc.operators import Operators
from rift.control.sql.host import SqlHost
from rift.errors import first_error
from rift.fleet.decision_reader import drive

logger = logging.getLogger(__name__)

# A shard that does not answer is asked again after this time.
LOG_RETRY_S = 1.0


class Duties(msgspec.Struct):
    """The parts of a leader that its metrics read: the counts of all janitors and, while it leads, its
    archiver and its SQL."""

    acted: Counter[str] = msgspec.field(default_factory=Counter)
    archiver: Archiver | None = None
    sql: SqlHost | None = None

    @asynccontextmanager
    async def held(self, archiver: Archiver, sql: SqlHost | None) -> AsyncIterator[None]:
        self.archiver, self.sql = archiver, sql
        try:
            yield
        finally:
            self.archiver = self.sql = None


async def lead(
    log: Log, projection: Projection, archive: Archive, config: ControlConfig, duties: Duties, epoch: int
) -> None:
    """Run every duty until cancelled. Another leader may run them too for a moment; see `leader.py`."""
    archiver = Archiver(
        log,
        archive,
        projection,
        retention_days=config.retention_days,
        signing_key=config.signing_key,
    )
    autoscaler = Autoscaler(log, projection, config.scaling, epoch=epoch)
    janitors: dict[int, Janitor] = {}
    operators = Operators(projection, config.sql, autoscaler.limits)
    handlers = Handlers(log, projection, archiver, janitors, operators)
    async with handlers.serving(), duties.held(archiver, operators.host), anyio.create_task_group() as tasks:

        async def keep(shard: int) -> None:
            """Run the duties of a shard. If it does not answer, the others go on meanwhile."""
            while True:
                janitors[shard] = Janitor(
                    log, shard=shard, accepted=autoscaler.request_accepted, acted=duties.acted
                )
                try:
                    async with anyio.create_task_group() as of_shard:
                        of_shard.start_soon(janitors[shard].run, projection.first_open)
                        of_shard.start_soon(UsageCorrection(log, projection.query, shard=shard).run)
                except* LogError as silent:
                    logger.warning("shard %d is not supervised now: %s", shard, first_error(silent))
                await anyio.sleep(LOG_RETRY_S)

        def supervise(shard: int) -> None:
            tasks.start_soon(keep, shard)

        supervise(0)
        tasks.start_soon(shards.follow, log, 1, supervise)
        tasks.start_soon(autoscaler.run)
        if config.driver is not None:
            tasks.start_soon(config.driver.run)
            tasks.start_soon(drive, log, config.driver)
        tasks.start_soon(archiver.run)
        tasks.start_soon(CreditSettlement(log, projection.query).run)
        tasks.start_soon(KeyErasure(log, projection.query).run)
