"""The control process: everything that follows the log for the whole installation.

Each projects; of several, one leads and does the rest. A standby has all that it takes to go on.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import anyio
from anyio import to_thread

from events import fleet, subjects
from events.log import Log
from replay.archive.archive import Archive
from replay.warehouse.result import QueryRefused
from replay.warehouse.warehouse import Warehouse
from rift.control.duties.archiver import Archiver
from rift.control.duties.autoscaler import Autoscaler, ModelScaling
from rift.control.duties.credit_settlement import CreditSettlement
from rift.control.duties.janitor import Janitor
from rift.control.duties.key_erasure import KeyErasure
from rift.control.leader import Leadership
from rift.control.projection.warehouse_host import Projection
from rift.control.rpc.handlers import Handlers
from rift.control.rpc.server import Answering, answering
from rift.fleet import Driver
from rift.fleet.decision_reader import follow
from rift.rpc import AskLanes, Question

# What is stored when control is told to stop is applied first: then a stopped installation shows all. A
# transaction that has begun is waited for, beyond this.
LAST_S = 0.6

# A file is changed for another within milliseconds.
RETRY_S = 0.1


async def run(
    log: Log,
    database: Path,
    archive: Archive,
    *,
    stop: anyio.Event,
    shards: Sequence[int] = (0,),
    retention_days: int = 7,
    served: Mapping[str, ModelScaling] | None = None,
    driver: Driver | None = None,
) -> None:
    """Project, and lead or stand by, until `stop` is set. Raises WarehouseError, LogError, LogBehind,
    LogTrimmed, ArchiveError."""
    warehouse = await to_thread.run_sync(Warehouse.open, database)
    projection = Projection(log, database, warehouse, archive, shards)
    leadership = Leadership(log, f"control-{secrets.token_hex(4)}")
    archiving = partial(Archiver, log, archive, shards=shards, retention_days=retention_days)
    scaling = partial(Autoscaler, log, projection, served or {})
    duties = Duties(log, projection, archiving, scaling, driver, shards)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(projection.run)
            tasks.start_soon(leadership.run, partial(_lead, duties))
            await stop.wait()
            with anyio.move_on_after(LAST_S):
                await projection.catch_up()
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(projection.warehouse.close)


class Duties(NamedTuple):
    """What a leader does, but for the epoch that it does it in; `driver` if control itself scales."""

    log: Log
    projection: Projection
    archiving: Callable[..., Archiver]
    scaling: Callable[..., Autoscaler]
    driver: Driver | None
    shards: Sequence[int]


async def _lead(duties: Duties, epoch: int) -> None:
    """Do what one does for all, until cancelled. See `leader.py` for what it must not rely upon."""
    log = duties.log
    projection = duties.projection
    driver = duties.driver
    archiver = duties.archiving(
        projected=lambda: projection.applied,
        needed_from=partial(_needed_from, log, projection),
        quarantined=lambda stream: projection.warehouse.quarantined(stream),
    )
    autoscaler = duties.scaling(epoch=epoch)
    janitors = [Janitor(log, shard=shard, accepted=autoscaler.asked) for shard in duties.shards]

    async def lanes(question: AskLanes) -> object:
        return {lane: silent_ms for janitor in janitors for lane, silent_ms in janitor.lanes().items()}

    answers: dict[type[Question], Answering] = {
        **Handlers(log, projection, archiver).answers(),
        AskLanes: lanes,
    }
    async with answering(log, answers), anyio.create_task_group() as tasks:
        for shard, janitor in zip(duties.shards, janitors, strict=True):
            tasks.start_soon(_watch, projection, subjects.shard_stream(shard), janitor)
        tasks.start_soon(autoscaler.run)
        if driver is not None:
            tasks.start_soon(driver.run)
            tasks.start_soon(follow, log, driver)
        tasks.start_soon(archiver.run)
        tasks.start_soon(CreditSettlement(log, lambda: projection.warehouse).run)
        tasks.start_soon(KeyErasure(log, lambda: projection.warehouse).run)


async def _watch(projection: Projection, stream: str, janitor: Janitor) -> None:
    """Keep requests ending, from as early as one may be open."""
    while True:
        try:
            first = await to_thread.run_sync(_first_open, projection.warehouse, stream)
            break
        except QueryRefused:
            # The file is being changed for another.
            await anyio.sleep(RETRY_S)
    await janitor.run(first=first)


async def _needed_from(log: Log, projection: Projection, stream: str) -> int:
    """Return the first sequence of a stream that somebody needs to go on. Raises LogError, QueryRefused."""
    if stream == subjects.FLEET:
        return (await fleet.read(log)).needed_from
    return await to_thread.run_sync(_first_open, projection.warehouse, stream)


def _first_open(warehouse: Warehouse, stream: str) -> int:
    """Return a sequence at or before every request that may be open."""
    applied = warehouse.positions().get(stream, 0)
    select = "select min(split_part(split_part(accepted_position, ':', 2), '.', 1)::bigint) from requests"
    (row,) = warehouse.query(
        f"{select} where finished_position is null and accepted_position like '{stream}:%'"
    ).rows
    return applied + 1 if row[0] is None else min(int(row[0]), applied + 1)
