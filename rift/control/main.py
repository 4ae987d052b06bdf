"""The control process: everything that follows the log for the whole installation."""

import sys
from collections.abc import Iterable
from pathlib import Path

import anyio
from anyio import to_thread

from events.log import Log
from replay.warehouse import ProjectionStopped, Warehouse
from rift.control.projector import project
from rift.control.questions import SQL_SUBJECT, answer_sql


async def run(log: Log, database: Path, *, shards: Iterable[int] = (0,)) -> None:
    """Project and answer questions until cancelled. Raises WarehouseError, LogError, LogBehind.

    A projection that stopped is said on standard error and in relation `lag`, and questions go on
    being answered: starting again would only stop at the same record.
    """
    warehouse = await to_thread.run_sync(Warehouse.open, database)
    try:
        async with log.answer(SQL_SUBJECT, answer_sql(warehouse)):
            try:
                await project(log, warehouse, shards)
            except* ProjectionStopped as stopped:
                for line in _messages(stopped):
                    print(f"rift control: {line}", file=sys.stderr, flush=True)
            await anyio.sleep_forever()
    finally:
        warehouse.close()


def _messages(group: BaseExceptionGroup[ProjectionStopped]) -> Iterable[str]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _messages(error)
        else:
            yield str(error)
