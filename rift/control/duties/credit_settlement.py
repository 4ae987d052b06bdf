"""Settle the credit holds of lost lanes, so that a gateway that dies returns the credit it reserved.

Time is the projection's: a hold is settled at a position at which its lane has been silent for
CREDIT_LANE_SILENT_S and every request under it has ended. How a live gateway settles its own holds must not
live here (`rift/gateway/admission/credit.py`).
"""

import logging
from collections.abc import Iterable
from functools import partial

import anyio

from events import codec, credit, stream_fold, subjects
from events.book import Book
from events.contracts import CREDIT_LANE_SILENT_S, SECOND_NS
from events.log import Log, LogError
from events.publisher import Publisher
from events.schema import CreditHeld
from replay.sql_files import sql
from replay.warehouse.result import QueryRefused
from rift.control.projection.warehouse_host import Query

logger = logging.getLogger(__name__)

WRITER = "control"

# `events/contracts.py` proves that a lane that has been silent this long spends no more.
SILENT_NS = int(CREDIT_LANE_SILENT_S * SECOND_NS)

TICK_S = 2.0
APPEND_S = 5.0


class CreditSettlement:
    """`query` answers SQL from the projection as it is."""

    def __init__(self, log: Log, query: Query) -> None:
        self._log = log
        self._publisher = Publisher(log, WRITER)
        self._query = query
        self._book = Book()
        self._reported_at_ns: dict[tuple[int, str], int] = {}

    async def run(self) -> None:
        """Settle until cancelled, or until the book cannot be read: then a settlement would not be seen, and
        repeated for ever. Raises LogError."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._keep_settling)
            await self.follow_book()
            tasks.cancel_scope.cancel()

    async def follow_book(self) -> None:
        """Fold the book from its beginning; return at a record that cannot be read. A settlement that is
        repeated meanwhile counts once. Raises LogError."""
        try:
            follow = partial(stream_fold.follow, self._log, subjects.BOOK, ["rift.book.>"], self._book)
            await follow(changed=lambda: None)
        except codec.RecordUnreadable as error:
            logger.error("holds of lost lanes are not settled until control is upgraded: %s", error)

    async def _keep_settling(self) -> None:
        while True:
            await anyio.sleep(TICK_S)
            try:
                await self.settle_lost()
            except (LogError, QueryRefused) as error:
                logger.warning("holds of lost lanes are not settled yet: %s", error)

    async def settle_lost(self) -> None:
        """Settle each hold of a silent lane whose requests have all ended. Raises LogError, QueryRefused."""
        holds = list(self._book.credits.open_holds())
        projected_ns = {shard: await self._projected_ns(shard) for shard in {hold.shard for hold in holds}}
        lost = [hold for hold in holds if await self._is_lost(hold, projected_ns[hold.shard])]
        if not lost:
            return
        costs = await self._costs(hold.id for hold in lost)
        for hold in lost:
            nanousd = costs.get(hold.id, 0)
            if nanousd is not None:
                logger.info("lane %s is lost; its hold %s cost %d nano-USD", hold.lane, hold.id, nanousd)
                await self._publisher.publish(credit.settlement(hold, nanousd), within_s=APPEND_S)

    async def _is_lost(self, hold: CreditHeld, projected_ns: int) -> bool:
        """Return whether the lane had been silent for long enough when its shard was projected. The log is
        only asked about lanes that seem lost."""
        lane = hold.shard, hold.lane
        if projected_ns - self._reported_at_ns.get(lane, 0) <= SILENT_NS:
            return False
        last = await self._log.last(subjects.shard_stream(hold.shard), subjects.lane(*lane))
        self._reported_at_ns[lane] = last.stored_at_ns if last is not None else 0
        return projected_ns - self._reported_at_ns[lane] > SILENT_NS

    async def _projected_ns(self, shard: int) -> int:
        stream = subjects.shard_stream(shard)
        [result] = await self._query(("select stored_at_ns from lag where stream = ?", [stream]))
        return int(result.rows[0][0]) if result.rows else 0

    async def _costs(self, holds: Iterable[str]) -> dict[str, int | None]:
        """Return the cost of each hold's requests, None while one of them runs. A hold without requests is
        missing."""
        [result] = await self._query((sql("control/hold_costs"), {"holds": list(holds)}))
        return {hold: nanousd if all_ended else None for hold, all_ended, nanousd in result.rows}
