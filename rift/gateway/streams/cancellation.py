"""Cancel requests on behalf of a client, of its absence, or of a revoked key.

A cancellation that the log does not store is repeated for as long as the process lives, because a client
that received an error must not be charged. If it is stored after the request has ended, control corrects the
charge (`rift/control/duties/usage_correction.py`).
"""

import logging
from collections.abc import Iterable

import anyio
from anyio.abc import TaskGroup

from events.contracts import ACCEPT_S, LATE_LANDING_S
from events.log import SCAN_TIMEOUT_S, LogError, OutcomeUnknown
from events.publisher import Publisher
from events.schema import CancelReason, CancelRequested, ClientAttached
from rift.gateway.choices import Choices
from rift.gateway.streams.log_health import LogHealth

logger = logging.getLogger(__name__)

RETRY_PAUSE_S = 1.0

# Cancellations that wait for the log, a few kB each. A gateway accepts nothing during an outage, so only the
# requests that were open before can add to them.
PENDING_MAX = 100_000


class Cancellation:
    """`tasks` outlives each client."""

    def __init__(self, publisher: Publisher, health: LogHealth, tasks: TaskGroup) -> None:
        self.health = health
        self._publisher = publisher
        self._tasks = tasks
        self._pending = 0
        # The cancellations that clients have asked for, and whether they are stored.
        self._by_clients: dict[str, anyio.Event] = {}

    async def cancel(self, request: str, why: CancelReason) -> None:
        """Ask for a request's end; return once that is stored, or if PENDING_MAX others wait.

        If the log does not store it within ACCEPT_S, the client was not served as promised: the request may
        go on meanwhile, so it is cancelled as unanswered and costs nothing.
        """
        if self._pending >= PENDING_MAX:
            logger.error("%s is not cancelled: %d cancellations wait for the log", request, PENDING_MAX)
            return
        self._pending += 1
        try:
            with anyio.move_on_after(ACCEPT_S):
                await self.keep_publishing(CancelRequested(request=request, why=why))
                return
            late: CancelReason = "revoked" if why == "revoked" else "unanswered"
            await self.keep_publishing(CancelRequested(request=request, why=late))
        finally:
            self._pending -= 1

    async def cancel_for_client(self, request: str) -> None:
        """Cancel a request that its client no longer wants; return once that is stored.

        Clients that ask at the same time share one record. Raises OutcomeUnknown if the log does not store it
        in time; it is then repeated in the background.
        """
        if (stored := self._by_clients.get(request)) is None:
            stored = self._by_clients[request] = anyio.Event()
            self._tasks.start_soon(self._cancel_once, request, stored)
        with anyio.move_on_after(ACCEPT_S), self.health.while_writable():
            await stored.wait()
            return
        raise OutcomeUnknown(f"the cancellation of {request} is not stored yet")

    async def _cancel_once(self, request: str, stored: anyio.Event) -> None:
        await self.cancel(request, "client")
        stored.set()
        # Those who read the request before do not see the record.
        await anyio.sleep(SCAN_TIMEOUT_S)
        del self._by_clients[request]

    def cancel_unanswered(self, group: Choices) -> None:
        """Cancel requests that may be stored although the client received an error, so that none is charged.

        An append may still succeed after its sender has timed out, so each cancellation is repeated after
        LATE_LANDING_S.
        """

        async def repeat() -> None:
            for pause_s in LATE_LANDING_S:
                await anyio.sleep(pause_s)
                for accepted in group:
                    await self.cancel(accepted.request, "unanswered")

        self._tasks.start_soon(repeat)

    def revoke(self, requests: Iterable[str]) -> None:
        """Cancel requests whose key was revoked."""
        for request in requests:
            self._tasks.start_soon(self.cancel, request, "revoked")

    async def keep_publishing(self, event: CancelRequested | ClientAttached) -> None:
        """Append an event; repeat it until it is stored, whatever the log answers."""
        is_logged = False
        while True:
            try:
                await self._publisher.publish(event, within_s=ACCEPT_S)
                return
            except LogError as error:
                if not is_logged:
                    logger.warning(
                        "%s of %s is not stored yet: %s", type(event).__name__, event.request, error
                    )
                is_logged = True
            await anyio.sleep(RETRY_PAUSE_S)
            await self.health.wait_writable()
