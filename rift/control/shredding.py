"""What nobody wants stored is forgotten: keys of content whose requests have ended are erased.

It is read from the log and the projection alone, so whoever leads next goes on with it. What must not live
here: keys of content that is kept, which a client erases (`rift/gateway/retrieving.py`), or age.
"""

import logging
from collections.abc import Callable
from typing import Any

import anyio
from anyio import to_thread

from events import sealing, subjects
from events.log import Follower, Log, LogError
from replay.answer import QueryRefused
from replay.warehouse import Warehouse

logger = logging.getLogger(__name__)

# A client that lost its connection comes back for the rest within 15 s; one that polls is slower.
GRACE_S = 60.0

TICK_S = 2.0


class Shredding:
    def __init__(self, log: Log, warehouse: Callable[[], Warehouse]) -> None:
        self._log, self._warehouse = log, warehouse
        self._requests: dict[int, tuple[str, ...]] = {}
        self._ended_at: dict[int, float] = {}

    async def run(self) -> None:
        """Erase what is due for as long as control leads. Raises LogError."""
        topics = [subjects.SECRET_PASSING]
        async with (
            self._log.follow(subjects.SECRETS, topics, after=0, pace_s=TICK_S) as reader,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(self._follow, reader)
            while True:
                await anyio.sleep(TICK_S)
                try:
                    await self._erase()
                except (LogError, QueryRefused) as error:
                    logger.warning("keys are not erased yet: %s", error)

    async def _follow(self, reader: Follower) -> None:
        async for batch in reader:
            for stored in batch:
                self._requests[stored.sequence] = sealing.read(stored.data).requests

    async def _erase(self) -> None:
        """Raises LogError, QueryRefused."""
        waiting = {key: named for key, named in self._requests.items() if key not in self._ended_at}
        ended = await self._ended({request for named in waiting.values() for request in named})
        now = anyio.current_time()
        self._ended_at |= {key: now for key, named in waiting.items() if ended.issuperset(named)}
        for key in [key for key, at in self._ended_at.items() if now - at >= GRACE_S]:
            await self._log.erase(subjects.SECRETS, key)
            del self._requests[key], self._ended_at[key]

    async def _ended(self, requests: set[str]) -> set[str]:
        if not requests:
            return set()
        listed = ", ".join("'" + request.replace("'", "''") + "'" for request in sorted(requests))
        select = "select request_id from requests where finished_position is not null"
        return {row[0] for row in await self._ask(f"{select} and request_id in ({listed})")}

    async def _ask(self, select: str) -> list[list[Any]]:
        return (await to_thread.run_sync(self._warehouse().query, select)).rows
