"""The requests that this gateway refused, counted and reported to its lane once a minute.

A report is repeated until its outcome is known, while later refusals are counted for the next one. So each is
in one report, and an outage of the log takes no more memory than two reports.
"""

from collections.abc import Callable

import anyio

from events.contracts import REFUSAL_COUNTS_MAX, REFUSALS_REPORT_S
from events.log import Log
from events.publisher import Publisher
from events.schema import RefusalCount, RequestsRefused
from rift.gateway.exchange import Exchange
from rift.gateway.state import GatewayConfig
from rift.gateway.streams.own_lane import LOST_WITHIN_S, STORED_WITHIN_S


class RefusalCounts:
    """Counts by account and reason, for as many pairs as a report has room; the rest is `other`."""

    def __init__(self) -> None:
        self.other = 0
        self._counts: dict[tuple[str | None, str], int] = {}

    def add(self, account: str | None, reason: str) -> None:
        pair = account, reason
        if pair in self._counts or len(self._counts) < REFUSAL_COUNTS_MAX:
            self._counts[pair] = self._counts.get(pair, 0) + 1
        else:
            self.other += 1

    def all(self) -> tuple[RefusalCount, ...]:
        return tuple(
            RefusalCount(account=account, reason=reason, count=count)
            for (account, reason), count in self._counts.items()
        )


class RefusalReports:
    """`now_ns` is the broker's time as this gateway estimates it; it may step back a little."""

    def __init__(self, log: Log, config: GatewayConfig, now_ns: Callable[[], int]) -> None:
        self._publisher = Publisher(log, config.lane, shard=config.shard)
        self._config = config
        self._now_ns = now_ns
        self._from_ns = now_ns()
        self._counts = RefusalCounts()
        # A report whose outcome is not known.
        self._unstored: RequestsRefused | None = None

    def observe(self, exchange: Exchange) -> None:
        """Count an answer with an error."""
        if exchange.status >= 400:
            self._counts.add(exchange.account, exchange.code)

    async def keep(self) -> None:
        """Report until cancelled."""
        while True:
            await anyio.sleep(REFUSALS_REPORT_S)
            await self._report()

    async def close(self) -> None:
        """Report what is left, if the log stores that at once."""
        with anyio.move_on_after(LOST_WITHIN_S):
            await self._report()

    async def _report(self) -> None:
        """Store the report whose outcome is not known, and then what was counted since."""
        if await self._stored():
            self._unstored = self._counted()
            await self._stored()

    async def _stored(self) -> bool:
        """Return whether no report is left to store, after a try."""
        report = self._unstored
        if report is not None and not await self._publisher.try_publish(report, within_s=STORED_WITHIN_S):
            return False
        self._unstored = None
        return True

    def _counted(self) -> RequestsRefused | None:
        """Return what was counted since the last report, and begin the next. None if nothing was."""
        from_ns, counts = self._from_ns, self._counts
        # Each report begins where the one before it ends, so that a repeated one is known.
        self._from_ns = to_ns = max(self._now_ns(), from_ns + 1)
        if not (refused := counts.all()):
            return None
        self._counts = RefusalCounts()
        return RequestsRefused(
            lane=self._config.lane,
            shard=self._config.shard,
            from_at_ns=from_ns,
            to_at_ns=to_ns,
            counts=refused,
            other=counts.other,
        )
