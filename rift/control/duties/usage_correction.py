"""Correct the charges of answers that no client could read.

A gateway that could not reach the log cancels such a request as `unanswered` once it can. If the request had
ended by then, that changes nothing in its life, so it is charged. This duty appends one `UsageCorrected` for
exactly that sum. The entry's id names the request, so it counts once, whichever leader appends it.

The log and the projection hold all of its state, so the next leader continues it.
"""

import logging
from collections.abc import Iterable

import anyio
import msgspec

from events import codec, subjects
from events.log import Follower, Log, LogError
from events.publisher import Publisher
from events.schema import CancelRequested, UsageCorrected
from replay.sql_files import sql
from replay.warehouse.result import QueryRefused
from rift.control.duties.shared_seconds import Run, correction_nanousd
from rift.control.projection.warehouse_host import Query

logger = logging.getLogger(__name__)

WRITER = "control"
REASON = "the client received an error in place of this answer"

TICK_S = 2.0
APPEND_S = 5.0

# A query for 100 requests takes milliseconds. If more wait, those that waited longest come first.
REQUESTS_A_QUERY = 100


class UnreadRequest(msgspec.Struct, frozen=True):
    """A request that was cancelled as unanswered, with the columns of `unread_requests.sql`."""

    request: str
    account: str
    model: str
    plan: str
    has_ended: bool
    is_charged: bool
    charge_nanousd: int


class UsageCorrection:
    """Corrects the charges of one shard. `query` answers SQL from the projection as it is."""

    def __init__(self, log: Log, query: Query, *, shard: int) -> None:
        self._log = log
        self._publisher = Publisher(log, WRITER)
        self._query = query
        self._shard = shard
        # Requests that were cancelled as unanswered and may still be charged, each with the sequence of its
        # last such cancellation.
        self._unanswered: dict[str, int] = {}
        # The last correction: the next query must see it.
        self._corrected_at = 0

    async def run(self) -> None:
        """Correct until cancelled. Raises LogError."""
        topics = [f"rift.{self._shard}.cancel.>"]
        stream = subjects.shard_stream(self._shard)
        async with (
            self._log.follow(stream, topics, after=0, pace_s=TICK_S) as reader,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(self._follow, reader)
            while True:
                await anyio.sleep(TICK_S)
                try:
                    await self._correct()
                except (LogError, QueryRefused) as error:
                    logger.warning("charges of unread answers are not corrected yet: %s", error)

    async def _follow(self, reader: Follower) -> None:
        async for batch in reader:
            for stored in batch:
                try:
                    events = codec.decode(stored.data, stored.subject)[1]
                except codec.RecordUnreadable as error:
                    logger.error("%s %d: %s", stored.subject, stored.sequence, error)
                    continue
                for event in events:
                    if isinstance(event, CancelRequested) and event.why == "unanswered":
                        self._unanswered[event.request] = stored.sequence

    async def _correct(self) -> None:
        """Correct what has been charged and is projected. Raises LogError, QueryRefused."""
        if not self._unanswered:
            return
        [lag] = await self._query(("select stream, sequence from lag", []))
        applied = dict(lag.rows)
        if applied.get(subjects.BOOK, 0) < self._corrected_at:
            return
        projected = applied.get(subjects.shard_stream(self._shard), 0)
        due = [each for each in self._unanswered.items() if each[1] <= projected][:REQUESTS_A_QUERY]
        requests = [request for request, _ in due]
        [result] = await self._query((sql("control/unread_requests"), {"requests": requests}))
        unread = {row[0]: UnreadRequest(*row) for row in result.rows}
        runs = await self._runs(unread.values())
        for request, at in due:
            found = unread.get(request)
            if found is not None and found.is_charged:
                nanousd = found.charge_nanousd
                if found.plan == "per_second":
                    near = runs.get((found.account, found.model), [])
                    nanousd = correction_nanousd(request, near)
                    for run in near:
                        if run.request == request:
                            run.corrected_nanousd = -nanousd
                await self._append(found, nanousd)
            if self._unanswered[request] != at:
                continue
            # An unknown request was never accepted; if it is later, a later cancellation follows.
            del self._unanswered[request]
            if found is not None and not found.has_ended:
                self._unanswered[request] = at

    async def _runs(self, unread: Iterable[UnreadRequest]) -> dict[tuple[str, str], list[Run]]:
        """Return when charged requests ran that may share seconds with `unread`, by account and model."""
        by_second = [found.request for found in unread if found.is_charged and found.plan == "per_second"]
        runs: dict[tuple[str, str], list[Run]] = {}
        if by_second:
            [result] = await self._query((sql("control/unread_spans"), {"requests": by_second}))
            for account, model, request, period, version, *run in result.rows:
                runs.setdefault((account, model), []).append(Run(request, (period, version), *run))
        return runs

    async def _append(self, unread: UnreadRequest, nanousd: int) -> None:
        """Raises LogError."""
        logger.info("%s was not read by its client; %d nano-USD are corrected", unread.request, nanousd)
        event = UsageCorrected(
            id=f"unanswered.{unread.request}",
            account=unread.account,
            nanousd=-nanousd,
            reason=REASON,
            request=unread.request,
            model=unread.model,
        )
        self._corrected_at = await self._publisher.publish(event, within_s=APPEND_S)
