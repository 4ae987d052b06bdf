"""The control process: everything that follows the log for the whole installation."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import anyio
from anyio import to_thread

from events import subjects
from events.log import Log
from replay.warehouse import Warehouse
from rift.control.answers import answering
from rift.control.closing import Sealed
from rift.control.desk import Desk
from rift.control.janitor import Janitor
from rift.control.projection import Projection
from rift.questions import QuestionRefused

# What is stored when control is told to stop is applied first: then a stopped installation shows all. A
# transaction that has begun is waited for, beyond this.
LAST_S = 0.6


async def run(log: Log, database: Path, *, stop: anyio.Event, shards: Iterable[int] = (0,)) -> None:
    """Project and answer questions until `stop` is set. Raises WarehouseError, LogError, LogBehind."""
    warehouse = await to_thread.run_sync(Warehouse.open, database)
    projection = Projection(log, database, warehouse, shards)
    try:
        async with (
            answering(log, Desk(log, projection, _no_archive).answers()),
            anyio.create_task_group() as tasks,
        ):
            for shard in shards:
                first = await to_thread.run_sync(_first_open, warehouse, shard)
                tasks.start_soon(partial(Janitor(log, shard=shard).run, first=first))
            tasks.start_soon(projection.run)
            await stop.wait()
            with anyio.move_on_after(LAST_S):
                await projection.catch_up()
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(projection.warehouse.close)


def _first_open(warehouse: Warehouse, shard: int) -> int:
    """Return a sequence at or before every request that may be open."""
    stream = subjects.shard_stream(shard)
    applied = warehouse.positions().get(stream, 0)
    select = "select min(split_part(split_part(accepted_position, ':', 2), '.', 1)::bigint) from requests"
    (row,) = warehouse.query(
        f"{select} where finished_position is null and accepted_position like '{stream}:%'"
    ).rows
    return applied + 1 if row[0] is None else min(int(row[0]), applied + 1)


async def _no_archive() -> Sealed:
    raise QuestionRefused("there is no archive")
