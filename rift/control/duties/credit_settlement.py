"""A gateway that dies gives its allowances back: control settles the holds of lanes that fell silent.

Time is the projection's: a hold is settled as of a position at which its lane had not spoken for a while,
and every request with its allowance had ended. What must not live here: what a gateway that lives does with
its own holds (`rift/gateway/admission/credit.py`).
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import anyio
from anyio import to_thread

from events import codec, credit, subjects
from events.book import Book
from events.contracts import SECOND_NS
from events.log import Log, LogError, append_until_known
from events.schema import CreditHeld
from replay.warehouse.result import QueryRefused
from replay.warehouse.warehouse import Warehouse

logger = logging.getLogger(__name__)

WRITER = "control"

# A gateway reserves for 10 s after its last report, appends what it accepts for 10 s more, and what it has
# sent can land for 35 s (gateway/delivery.py). A lane that has been silent for longer spends no more.
SILENT_NS = 60 * SECOND_NS

TICK_S = 2.0
APPEND_S = 5.0

# Seconds as a hold counts them (`rift/gateway/admission/credit.py`), united as those of invoice lines are.
SPENT = """
with mine as (
    from requests where allowance in (select unnest({holds}))
),
ran as (
    select allowance, mine.model, price_version, attempts.started_at_ns as from_ns, last_event_at_ns as to_ns
    from attempts
    join mine using (request_id)
    where plan = 'per_second' and billed_output_tokens > 0
),
begun as (
    select *, from_ns > coalesce(max(to_ns) over (
        partition by allowance, model, price_version order by from_ns, to_ns
        rows between unbounded preceding and 1 preceding
    ), -1) as is_first
    from ran
),
united as (
    select *, sum(is_first::integer) over (
        partition by allowance, model, price_version order by from_ns, to_ns rows unbounded preceding
    ) as number
    from begun
),
unions as (
    select allowance, model, price_version, (max(to_ns) - min(from_ns) + 999999999) // 1000000000 as seconds
    from united
    group by allowance, model, price_version, number
),
costs as (
    select allowance, seconds * coalesce(second_nanousd, 0) as nanousd
    from unions
    join prices on prices.version = unions.price_version and prices.model = unions.model
    union all
    select allowance, charge_nanousd from mine where plan = 'per_token'
),
spent as (
    select allowance, sum(nanousd) as nanousd from costs group by allowance
)
select allowance, bool_and(finished_at_ns is not null), coalesce(any_value(nanousd), 0)::bigint
from mine
left join spent using (allowance)
group by allowance
"""


class CreditSettlement:
    def __init__(self, log: Log, warehouse: Callable[[], Warehouse]) -> None:
        self._log = log
        self._warehouse = warehouse
        self._book = Book()
        self._heard_ns: dict[tuple[int, str], int] = {}

    async def run(self) -> None:
        """Give back what is due for as long as the book can be read. Raises LogError."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._keep_settling)
            await self._follow()
            # What is settled would not be seen, and be settled again for ever.
            tasks.cancel_scope.cancel()

    async def _keep_settling(self) -> None:
        while True:
            await anyio.sleep(TICK_S)
            try:
                await self.settle_lost()
            except (LogError, QueryRefused) as error:
                logger.warning("holds of lost lanes are not settled yet: %s", error)

    async def settle_lost(self) -> None:
        """Settle every hold of a silent lane whose requests have all ended. Raises LogError, QueryRefused."""
        holds = list(self._book.credits.open_holds())
        projected = {shard: await self._projected_ns(shard) for shard in {held.shard for held in holds}}
        lost = [held for held in holds if await self._is_lost(held, projected[held.shard])]
        if not lost:
            return
        spent = await self._spent(held.id for held in lost)
        for held in lost:
            nanousd = spent.get(held.id, 0)
            if nanousd is not None:
                logger.info("lane %s is lost; of its %s, %d nano-USD were spent", held.lane, held.id, nanousd)
                data = codec.encode(WRITER, [credit.settlement(held, nanousd)])
                subject = credit.subject(held.account)
                await append_until_known(self._log, subjects.BOOK, subject, data, within_s=APPEND_S)

    async def _is_lost(self, held: CreditHeld, projected_ns: int) -> bool:
        """Say whether the lane had long been silent at what is projected of its shard. Only a lane that seems
        so is asked for."""
        lane = held.shard, held.lane
        if projected_ns - self._heard_ns.get(lane, 0) <= SILENT_NS:
            return False
        last = await self._log.last(subjects.shard_stream(held.shard), subjects.lane(*lane))
        self._heard_ns[lane] = last.stored_at_ns if last is not None else 0
        return projected_ns - self._heard_ns[lane] > SILENT_NS

    async def _projected_ns(self, shard: int) -> int:
        stream = subjects.shard_stream(shard)
        rows = await self._ask(f"select stored_at_ns from lag where stream = '{stream}'")
        return int(rows[0][0]) if rows else 0

    async def _spent(self, holds: Iterable[str]) -> dict[str, int | None]:
        """Return what the requests of each hold cost; None while one of them is under way. A hold that has
        none is not named."""
        listed = ", ".join("'" + hold.replace("'", "''") + "'" for hold in holds)
        rows = await self._ask(SPENT.format(holds=f"[{listed}]"))
        return {hold: nanousd if all_ended else None for hold, all_ended, nanousd in rows}

    async def _ask(self, select: str) -> list[list[Any]]:
        return (await to_thread.run_sync(self._warehouse().query, select)).rows

    async def _follow(self) -> None:
        """Fold the book from its beginning, and return at what cannot be read. What is settled once more
        meanwhile counts once."""
        async with self._log.follow(subjects.BOOK, ["rift.book.>"], after=0) as reader:
            try:
                async for batch in reader:
                    for stored in batch:
                        self._book.fold(stored)
            except codec.RecordUnreadable as error:
                logger.error("holds of lost lanes are not settled until control is newer: %s", error)
