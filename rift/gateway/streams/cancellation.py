"""Cancel requests on behalf of a client, of its absence, or of a revoked key."""

import logging
from collections.abc import Iterable

import anyio
from anyio.abc import TaskGroup

from events.contracts import LATE_LANDING_S
from events.log import LogError
from events.publisher import Publisher
from events.schema import CancelReason, CancelRequested, ClientAttached
from rift.gateway.choices import Choices

logger = logging.getLogger(__name__)

# A client that received an error must not be charged, so keep retrying the cancellation this long.
RETRY_S = 300.0
RETRY_PAUSE_S = 1.0


class Cancellation:
    """`tasks` outlives each client."""

    def __init__(self, publisher: Publisher, tasks: TaskGroup) -> None:
        self._publisher = publisher
        self._tasks = tasks

    async def cancel(self, request: str, why: CancelReason) -> None:
        """Ask for a request's end; return once that is stored, or was retried for RETRY_S."""
        await publish_patiently(self._publisher, CancelRequested(request=request, why=why))

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


async def publish_patiently(publisher: Publisher, event: CancelRequested | ClientAttached) -> None:
    """Append an event, retrying whatever the log answers; log an error after RETRY_S."""
    with anyio.move_on_after(RETRY_S) as timer:
        while True:
            try:
                await publisher.publish(event, within_s=RETRY_S)
                return
            except LogError as error:
                logger.warning("%s is not stored yet: %s", event, error)
                await anyio.sleep(RETRY_PAUSE_S)
    if timer.cancelled_caught:
        logger.error("%s could not be stored", event)
