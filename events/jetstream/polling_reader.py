"""A live reader that fetches many messages at a time, at a fixed pace.

Each message of a push reader wakes its process. A process that reads a whole shard and need not react at once
saves that: messages wait at the broker between two pulls.
"""

import logging
from collections.abc import Sequence

import anyio
import nats.errors
from nats.aio.client import Client

from events.clock import now_s
from events.jetstream.history_scan import BATCH, create, delete, pull
from events.jetstream.push_reader import RETRY_S, Api
from events.log import LogError, Stored

logger = logging.getLogger(__name__)

# A pull waits this long for a first message, or twice the reader's pace: well below the time after which
# the broker removes an inactive consumer.
WAIT_S = 3.0

# uvloop counts whole milliseconds; if a deadline is just after one, it busy-polls until the next.
CLOCK_S = 0.0002


class PollingReader:
    """Hand out every stored message of its subjects once, in order; without a pause while it lags."""

    def __init__(
        self, client: Client, api: Api, stream: str, subjects: Sequence[str], after: int, pace_s: float
    ) -> None:
        self.position = after
        self._client = client
        self._api = api
        self._stream = stream
        self._subjects = subjects
        self._pace_s = pace_s
        self._consumer: str | None = None
        self._seen = 0
        self._next_at_s = 0.0
        self._interrupted = False
        self._pulling = anyio.CancelScope()
        self._hurry = anyio.Event()

    async def open(self) -> None:
        self._consumer = await create(
            self._client, self._api, self._stream, self._subjects, after=self.position
        )
        self._seen = 0

    async def close(self) -> None:
        consumer = self._consumer
        self._consumer = None
        if consumer is not None and not self._client.is_closed:
            await delete(self._client, consumer)

    def interrupt(self) -> None:
        """Cancel the pull: it was lost with the connection, and perhaps the consumer too."""
        self._interrupted = True
        self._pulling.cancel()

    def hurry(self) -> None:
        self._hurry.set()

    def __aiter__(self) -> "PollingReader":
        return self

    async def __anext__(self) -> Sequence[Stored]:
        with anyio.move_on_at(self._next_at_s - CLOCK_S):
            await self._hurry.wait()
        self._hurry = anyio.Event()
        waited = False
        while True:
            try:
                batch = await self._pull(waited)
                waited = batch == []
                if batch:
                    self._seen += len(batch)
                    self.position = batch[-1].sequence
                    if len(batch) < BATCH:
                        self._next_at_s = now_s() + self._pace_s
                    return batch
                if batch is None:
                    await self.close()
                    await self.open()
            except (LogError, nats.errors.Error) as error:
                logger.warning("%s: %s; will read on after sequence %d", self._stream, error, self.position)
                await anyio.sleep(RETRY_S)

    async def _pull(self, waited: bool) -> list[Stored] | None:
        """Return the messages that are stored, or the first to come, if any; None if some may be lost.

        If the last pull `waited` for a message and there was none, wait at once.
        """
        # A cancelled pull may have advanced the consumer, so it is kept only after a complete one.
        consumer = self._consumer
        self._consumer = None
        interrupted = self._interrupted
        self._interrupted = False
        if consumer is None or interrupted:
            return None
        batch: list[Stored] | None = None
        with anyio.CancelScope() as self._pulling:
            batch = [] if waited else await pull(self._client, consumer, self._seen)
            if batch == []:
                batch = None
                wait_s = max(WAIT_S, 2 * self._pace_s)
                batch = await pull(self._client, consumer, self._seen, batch=1, wait_s=wait_s)
        if batch is not None:
            self._consumer = consumer
        return batch
