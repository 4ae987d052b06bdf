"""The control process: everything that follows the log for the whole installation."""

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import anyio
from anyio import to_thread

from events import subjects
from events.log import Log
from replay.warehouse import ProjectionStopped, Warehouse
from rift.control.janitor import Janitor
from rift.control.projector import Projector
from rift.control.questions import SQL_SUBJECT, answer_sql
from rift.control.settling import Settling

logger = logging.getLogger(__name__)


# What is stored when control is told to stop is applied first: then a stopped installation shows all. A
# transaction that has begun is waited for, beyond this.
LAST_S = 0.6


async def run(log: Log, database: Path, *, stop: anyio.Event, shards: Iterable[int] = (0,)) -> None:
    """Project and answer questions until `stop` is set. Raises WarehouseError, LogError, LogBehind.

    A projection that stopped is logged and in relation `lag`, and questions go on
    being answered: starting again would only stop at the same record.
    """
    warehouse = await to_thread.run_sync(Warehouse.open, database)
    try:
        projector = Projector(log, warehouse, shards)
        handler = answer_sql(warehouse, projector.catch_up)
        async with log.answer(SQL_SUBJECT, handler), anyio.create_task_group() as tasks:
            for shard in shards:
                first = await to_thread.run_sync(_first_open, warehouse, shard)
                tasks.start_soon(partial(Janitor(log, shard=shard).run, first=first))
            tasks.start_soon(_project, projector)
            tasks.start_soon(Settling(log, warehouse).run)
            await stop.wait()
            with anyio.move_on_after(LAST_S):
                await projector.catch_up()
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(warehouse.close)


async def _project(projector: Projector) -> None:
    try:
        await projector.run()
    except* ProjectionStopped as stopped:
        for line in _messages(stopped):
            logger.error("%s", line)


def _first_open(warehouse: Warehouse, shard: int) -> int:
    """Return a sequence at or before every request that may be open."""
    stream = subjects.shard_stream(shard)
    applied = warehouse.positions().get(stream, 0)
    select = "select min(split_part(split_part(accepted_position, ':', 2), '.', 1)::bigint) from requests"
    (row,) = warehouse.query(
        f"{select} where finished_position is null and accepted_position like '{stream}:%'"
    ).rows
    return applied + 1 if row[0] is None else min(int(row[0]), applied + 1)


def _messages(group: BaseExceptionGroup[ProjectionStopped]) -> Iterable[str]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _messages(error)
        else:
            yield str(error)
