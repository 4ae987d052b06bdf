"""What nobody wants stored is forgotten: keys of content whose requests have ended are erased.

It is read from the log and the projection alone, so whoever leads next goes on with it. What must not live
here: keys of content that is kept, which a client erases (`rift/gateway/api/requests.py`), or age.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from itertools import islice
from typing import Any

import anyio
import msgspec
from anyio import to_thread

from events import encryption, ids, subjects
from events.contracts import SECOND_NS
from events.log import Follower, Log, LogError
from replay.warehouse.result import QueryRefused
from replay.warehouse.warehouse import Warehouse

logger = logging.getLogger(__name__)

# A client that lost its connection comes back for the rest within 15 s; one that polls is slower.
GRACE_S = 60.0

TICK_S = 2.0

# An idempotency key's entry names a key for 24 hours, and whoever reads it then has accepted in less than a
# minute. What no acceptance has named by then, none will: its gateway refused the request, or died.
NAMED_FOR_S = 24 * 3600 + 15 * 60

# A question for 500 takes 30 ms with three million requests. Where more wait than 20 questions ask for, those
# that were asked for longest ago are next.
KEYS_A_QUESTION = 500
KEYS_A_TICK = 20 * KEYS_A_QUESTION


class Passing(msgspec.Struct):
    """A key that waits for the end of these requests."""

    open: set[str]
    stored_at_ns: int


class KeyErasure:
    def __init__(self, log: Log, warehouse: Callable[[], Warehouse]) -> None:
        self._log = log
        self._warehouse = warehouse
        self._waiting: dict[int, Passing] = {}
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
                named = set(encryption.read(stored.data).requests)
                self._waiting[stored.sequence] = Passing(named, stored.stored_at_ns)

    async def _erase(self) -> None:
        """Raises LogError, QueryRefused."""
        if self._waiting:
            await self._drop_gone()
            await self._find_ended()
        now = anyio.current_time()
        for key in [key for key, at in self._ended_at.items() if now - at >= GRACE_S]:
            await self._log.erase(subjects.SECRETS, key)
            del self._ended_at[key]

    async def _drop_gone(self) -> None:
        """Forget the keys that have left by age, or for want of room. Raises LogError."""
        first = await self._log.first_sequence(subjects.SECRETS)
        for key in [key for key in self._waiting if key < first]:
            del self._waiting[key]

    async def _find_ended(self) -> None:
        """Raises QueryRefused."""
        # Asked first: what was stored by then has its row in the answers that follow.
        applied = dict(await self._ask("select stream, stored_at_ns from lag"))
        due = list(islice(self._waiting, KEYS_A_TICK))
        for at in range(0, len(due), KEYS_A_QUESTION):
            keys = due[at : at + KEYS_A_QUESTION]
            ended = await self._ended({request for key in keys for request in self._waiting[key].open})
            for key in keys:
                self._take(key, ended, applied)

    def _take(self, key: int, ended: Mapping[str, bool], applied: Mapping[str, int]) -> None:
        passing = self._waiting.pop(key)
        passing.open = {
            request
            for request in passing.open
            if not (
                ended[request] if request in ended else _never_comes(request, passing.stored_at_ns, applied)
            )
        }
        if passing.open:
            self._waiting[key] = passing
        else:
            self._ended_at[key] = anyio.current_time()

    async def _ended(self, requests: Collection[str]) -> dict[str, bool]:
        """Return of each request that was accepted whether it has ended. Raises QueryRefused."""
        listed = ", ".join("'" + request.replace("'", "''") + "'" for request in sorted(requests))
        select = "select request_id, finished_position is not null from requests"
        return dict(await self._ask(f"{select} where request_id in ({listed})"))

    async def _ask(self, select: str) -> list[list[Any]]:
        return (await to_thread.run_sync(self._warehouse().query, select)).rows


def _never_comes(request: str, stored_at_ns: int, applied: Mapping[str, int]) -> bool:
    """Say of a request that has no row whether its stream is applied beyond all that may name its key."""
    stream = subjects.shard_stream(ids.parsed(request).at.shard)
    return applied.get(stream, 0) - stored_at_ns > NAMED_FOR_S * SECOND_NS
