"""The duties of a leader, built and run together for one epoch."""

import anyio

from events import shards
from events.log import Log
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
from rift.fleet.decision_reader import drive


async def lead(log: Log, projection: Projection, archive: Archive, config: ControlConfig, epoch: int) -> None:
    """Run every duty until cancelled. Another leader may run them too for a moment; see `leader.py`."""
    archiver = Archiver(log, archive, projection, retention_days=config.retention_days)
    autoscaler = Autoscaler(log, projection, config.scaling, epoch=epoch)
    janitors: list[Janitor] = []
    operators = Operators(projection, config.sql)
    handlers = Handlers(log, projection, archiver, janitors, operators)
    async with handlers.serving(), anyio.create_task_group() as tasks:

        def supervise(shard: int) -> None:
            janitor = Janitor(log, shard=shard, accepted=autoscaler.request_accepted)
            janitors.append(janitor)
            tasks.start_soon(janitor.run, projection.first_open)
            tasks.start_soon(UsageCorrection(log, projection.query, shard=shard).run)

        supervise(0)
        tasks.start_soon(shards.follow, log, 1, supervise)
        tasks.start_soon(autoscaler.run)
        if config.driver is not None:
            tasks.start_soon(config.driver.run)
            tasks.start_soon(drive, log, config.driver)
        tasks.start_soon(archiver.run)
        tasks.start_soon(CreditSettlement(log, projection.query).run)
        tasks.start_soon(KeyErasure(log, projection.query).run)
