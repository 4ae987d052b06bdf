"""Erase the keys of content that is not to be stored, once the requests that use them have ended.

The log and the projection hold all of its state, so the next leader continues it. Keys of content that is
kept must not be erased here: a client erases those (`rift/gateway/api/requests.py`), or their age does.
"""

import logging
from collections.abc import Collection, Mapping
from itertools import islice

import anyio
import msgspec

from events import encryption, ids, subjects
from events.contracts import CONTENT_KEY_GRACE_S, SECOND_NS, UNUSED_CONTENT_KEY_S
from events.log import Follower, Log, LogError
from replay.warehouse.result import QueryRefused
from rift.control.projection.warehouse_host import Query

logger = logging.getLogger(__name__)

TICK_S = 2.0

# With a million requests, to ask which of 10,000 are open takes 25 ms, and which have ended 70 ms.
# If more keys wait, those that have waited longest since their last query come first.
KEYS_A_TICK = 10_000

OPEN = (
    "select request_id, false from requests "
    "where finished_position is null and request_id in (select unnest(?))"
)
ENDED = (
    "select request_id, finished_position is not null from requests where request_id in (select unnest(?))"
)


class WaitingKey(msgspec.Struct):
    """A key that is erased once these requests have ended."""

    open_requests: set[str]
    stored_at_ns: int


class KeyErasure:
    """`query` answers SQL from the projection as it is."""

    def __init__(self, log: Log, query: Query) -> None:
        self._log = log
        self._query = query
        # By the key's sequence in the stream of secrets.
        self._waiting: dict[int, WaitingKey] = {}
        self._ended_at_s: dict[int, float] = {}

    async def run(self) -> None:
        """Erase keys until cancelled. Raises LogError."""
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
                requests = set(encryption.read(stored.data).requests)
                self._waiting[stored.sequence] = WaitingKey(requests, stored.stored_at_ns)

    async def _erase(self) -> None:
        """Raises LogError, QueryRefused."""
        if self._waiting:
            await self._drop_gone()
            await self._find_ended()
        now_s = anyio.current_time()
        for key in [key for key, at_s in self._ended_at_s.items() if now_s - at_s >= CONTENT_KEY_GRACE_S]:
            await self._log.erase(subjects.SECRETS, key)
            del self._ended_at_s[key]

    async def _drop_gone(self) -> None:
        """Forget the keys that the log has dropped for their age or for room. Raises LogError."""
        first = await self._log.first_sequence(subjects.SECRETS)
        for key in [key for key in self._waiting if key < first]:
            del self._waiting[key]

    async def _find_ended(self) -> None:
        """Raises QueryRefused."""
        # Queried first: the queries below then see a row for everything that was stored by these times.
        [lag] = await self._query(("select stream, stored_at_ns from lag", []))
        applied_ns = dict(lag.rows)
        keys = list(islice(self._waiting, KEYS_A_TICK))
        requests = {request for key in keys for request in self._waiting[key].open_requests}
        # Most are open, and few rows are: only the others are looked up among all requests.
        ended = await self._ended(OPEN, requests)
        ended |= await self._ended(ENDED, requests - ended.keys())
        for key in keys:
            self._check(key, ended, applied_ns)

    def _check(self, key: int, ended: Mapping[str, bool], applied_ns: Mapping[str, int]) -> None:
        """Note that the key's requests have ended, or move the key to the end of the queue."""
        waiting = self._waiting.pop(key)
        waiting.open_requests = {
            request
            for request in waiting.open_requests
            if not (
                ended[request]
                if request in ended
                else _never_accepted(request, waiting.stored_at_ns, applied_ns)
            )
        }
        if waiting.open_requests:
            self._waiting[key] = waiting
        else:
            self._ended_at_s[key] = anyio.current_time()

    async def _ended(self, question: str, requests: Collection[str]) -> dict[str, bool]:
        """Return whether each accepted request of the answer has ended. Raises QueryRefused."""
        if not requests:
            return {}
        [result] = await self._query((question, [sorted(requests)]))
        return dict(result.rows)


def _never_accepted(request: str, stored_at_ns: int, applied_ns: Mapping[str, int]) -> bool:
    """Return whether a request without a row can no longer appear: its stream is applied past the last time
    at which an acceptance may name the key."""
    if (parsed := ids.parse_request_id(request)) is None:
        return True
    stream = subjects.shard_stream(parsed.at.shard)
    return applied_ns.get(stream, 0) - stored_at_ns > UNUSED_CONTENT_KEY_S * SECOND_NS
