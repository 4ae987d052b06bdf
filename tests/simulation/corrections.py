"""Control's corrections of a simulated service: charges of requests whose gateway reported an error."""

from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio

from events import codec, subjects
from events.memory import MemoryBroker, MemoryLog
from events.schema import CancelRequested
from replay.warehouse.result import QueryResult
from replay.warehouse.warehouse import Warehouse
from rift.control.duties.usage_correction import TICK_S, UsageCorrection
from rift.control.projection.warehouse_host import Query
from tests.simulation.ledger import shard_streams

PASSES = 4


def inline(warehouse: Warehouse) -> Query:
    """Query the warehouse without a thread, which the simulated clock does not allow."""

    async def query(*questions: Any) -> list[QueryResult]:
        return warehouse.read(*questions)

    return query


def unanswered(broker: MemoryBroker) -> Collection[str]:
    """Return the requests whose gateway answered with an error and cancelled them."""
    return {
        event.request
        for name in shard_streams(broker)
        for stored in broker.stream(name).messages
        for event in codec.decode(stored.data)[1]
        if isinstance(event, CancelRequested) and event.why == "unanswered"
    }


async def correct(broker: MemoryBroker) -> dict[str, int]:
    """Project the log and run control's duty; return the correction of each request, in nano-USD."""
    with closing(Warehouse.open(Path(":memory:"))) as warehouse:

        def project() -> None:
            for name in (subjects.BOOK, subjects.FLEET, *shard_streams(broker)):
                if messages := broker.stream(name).messages[warehouse.positions().get(name, 0) :]:
                    warehouse.apply(name, messages)

        async with anyio.create_task_group() as tasks:
            for shard in range(broker.shards):
                tasks.start_soon(UsageCorrection(MemoryLog(broker), inline(warehouse), shard=shard).run)
            for _ in range(PASSES):
                project()
                await anyio.sleep(TICK_S)
            tasks.cancel_scope.cancel()
        project()
        [result] = warehouse.read(("select request_id, sum(nanousd) from corrections group by all", []))
    return {request: int(nanousd) for request, nanousd in result.rows}
