"""The control process: it projects the log for the whole installation, and leads or stands by.

A standby projects too, so it can take over at once.
"""

import logging
import secrets
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
from anyio import to_thread

from events.log import Log
from replay.archive.archive import Archive
from replay.disk import DiskRefused, naming
from replay.warehouse.warehouse import Warehouse, WarehouseOutdated
from rift.control.config import ControlConfig
from rift.control.leader import Leadership
from rift.control.leader_duties import Duties, lead
from rift.control.projection.warehouse_host import Projection, remove
from rift.control.samples import Samples
from rift.metrics import control, listener
from rift.metrics.families import Collector

logger = logging.getLogger(__name__)

# On `stop`, records that are already stored are applied first, so that a stopped installation shows them. A
# transaction that has begun is finished even after this time.
LAST_S = 0.6


async def run(
    log: Log, database: Path, archive: Archive, config: ControlConfig, *, stop: anyio.Event
) -> None:
    """Project, and lead or stand by, until `stop` is set.

    Raises WarehouseError, LogError, LogBehind, LogTrimmed, ArchiveError.
    """
    warehouse = await to_thread.run_sync(_opened, database)
    projection = Projection(log, database, warehouse, archive)
    duties = Duties()
    samples = Samples(log, database, config.reserve)
    collectors: list[Collector] = []
    try:
        async with (
            listener.serving(config.metrics, collectors) as metrics,
            anyio.create_task_group() as tasks,
        ):
            leadership = Leadership(log, f"control-{secrets.token_hex(4)}", metrics=str(metrics or ""))
            collectors += control.collectors(leadership, projection, duties, samples)
            if metrics is not None:
                tasks.start_soon(samples.run, projection.streams)
            tasks.start_soon(projection.run)
            tasks.start_soon(leadership.run, partial(lead, log, projection, archive, config, duties))
            await stop.wait()
            with anyio.move_on_after(LAST_S):
                await projection.catch_up()
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(projection.warehouse.close)


def _opened(database: Path) -> Warehouse:
    """Open the warehouse; start an empty one if another version of Rift made the file. The projection opens
    it later if the disk is full or read-only.

    Raises WarehouseError.
    """
    warehouse = Warehouse(database)
    with suppress(DiskRefused):
        try:
            warehouse.ensure_open()
        except WarehouseOutdated:
            logger.warning("%s was made by another version of Rift: it is built again", database)
            with naming(database):
                remove(database)
            warehouse.ensure_open()
    return warehouse
