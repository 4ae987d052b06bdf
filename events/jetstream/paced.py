"""A reader for who can wait a little: many messages at a time, asked for at a pace.

Each message of a live reader wakes its process. Who reads a whole shard and answers nobody at once
is spared that: what comes between two pulls waits at the broker.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import anyio
import nats.errors
from nats.aio.client import Client

from events.jetstream.follower import RETRY_S, Api
from events.jetstream.scan import BATCH, consumer, pull
from events.log import LogError, Stored

logger = logging.getLogger(__name__)

# Where nothing comes, one pull waits so long for the first message; well below what a consumer may be
# silent for until the broker forgets it.
WAIT_S = 3.0

# uvloop counts whole milliseconds, and polls for a deadline that is a hair behind one until the next.
CLOCK_S = 0.0002


class PacedFollower:
    """Hands out every stored message of its subjects, in order, none twice; without a pause while it is
    behind."""

    def __init__(
        self, client: Client, api: Api, stream: str, subjects: Sequence[str], after: int, pace_s: float
    ) -> None:
        self.position = after
        self._client, self._api = client, api
        self._stream, self._subjects, self._pace_s = stream, subjects, pace_s
        self._waiting = anyio.CancelScope()
        self._hurry = anyio.Event()
        self._batches = self._read()

    async def open(self) -> None:
        """Raise LogError where the stream cannot be read."""
        async with consumer(self._client, self._api, self._stream, self._subjects, after=self.position):
            pass

    async def close(self) -> None:
        await self._batches.aclose()

    def interrupt(self) -> None:
        """The connection was lost: an outstanding pull is lost with it."""
        self._waiting.cancel()

    def hurry(self) -> None:
        self._hurry.set()

    def __aiter__(self) -> "PacedFollower":
        return self

    async def __anext__(self) -> Sequence[Stored]:
        return await anext(self._batches)

    async def _read(self) -> AsyncGenerator[Sequence[Stored], None]:
        while True:
            try:
                async with aclosing(self._read_on()) as batches:
                    async for batch in batches:
                        yield batch
            except (LogError, nats.errors.Error) as error:
                logger.warning("%s: %s; reading on after %d", self._stream, error, self.position)
                await anyio.sleep(RETRY_S)

    async def _read_on(self) -> AsyncGenerator[Sequence[Stored], None]:
        """Yield what comes, until some may have been lost."""
        async with consumer(
            self._client, self._api, self._stream, self._subjects, after=self.position
        ) as subject:
            seen = 0
            while (batch := await self._next(subject, seen)) is not None:
                if batch:
                    seen += len(batch)
                    self.position = batch[-1].sequence
                    yield batch
                    if len(batch) < BATCH:
                        with anyio.move_on_after(self._pace_s - CLOCK_S):
                            await self._hurry.wait()
                        self._hurry = anyio.Event()

    async def _next(self, subject: str, seen: int) -> list[Stored] | None:
        """Return what there is, else the first message that comes."""
        batch: list[Stored] | None = None
        with anyio.CancelScope() as self._waiting:
            batch = await pull(self._client, subject, seen)
            if batch == []:
                batch = await pull(self._client, subject, seen, batch=1, wait_s=WAIT_S)
        return batch
