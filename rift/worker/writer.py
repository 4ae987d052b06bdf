"""The one writer of a worker's answers on a lane: group commit with one append in flight.

Whatever the lane's requests produce while an append waits for its acknowledgement is the next
record. So order is certain, a retry is the identical record, and no timer holds a token back.
"""

import logging
from collections.abc import Callable
from typing import Protocol

import anyio

from events import codec
from events.log import Log, LogError, append_until_known
from events.schema import AnyEvent

logger = logging.getLogger(__name__)

# A quarter of the broker's largest message: a record that grew while the log was slow is split here.
RECORD_BYTES_MAX = 2 * 1024 * 1024

# A broker restarts in a second or two. Who cannot append for this long stops generating.
BLOCKED_S = 5.0
RETRY_S = 1.0


class Writer(Protocol):
    """What an attempt needs of its lane's writer."""

    def put(self, *events: AnyEvent) -> None:
        """Queue events behind all that were put before; together they are stored, or not."""

    async def put_durably(self, event: AnyEvent) -> int:
        """Queue an event and return the sequence of its record once it is stored."""


class LaneWriter:
    def __init__(
        self, log: Log, stream: str, subject: str, *, name: str, blocked: Callable[[], None]
    ) -> None:
        self._log, self._stream, self._subject, self._name = log, stream, subject, name
        self._blocked = blocked
        self._queue: list[bytes] = []
        self._waiting: list[tuple[int, anyio.Event, list[int]]] = []
        self._stored = 0
        self._wake = anyio.Event()
        self._idle = anyio.Event()

    def put(self, *events: AnyEvent) -> None:
        self._queue.append(b",".join([codec.encode_event(event) for event in events]))
        self._wake.set()

    async def put_durably(self, event: AnyEvent) -> int:
        self.put(event)
        stored, sequence = anyio.Event(), [0]
        self._waiting.append((self._stored + len(self._queue), stored, sequence))
        await stored.wait()
        return sequence[0]

    async def run(self) -> None:
        """Append for as long as the worker lives; `blocked` is called while the log takes nothing."""
        while True:
            while self._queue:
                await self._append()
            self._idle.set()
            await self._wake.wait()
            self._wake = anyio.Event()

    async def flushed(self) -> None:
        """Wait until everything that was put is stored."""
        while self._queue:
            self._idle = anyio.Event()
            await self._idle.wait()

    async def _append(self) -> None:
        events = self._take()
        sequence = await self._persist(codec.join(self._name, events))
        del self._queue[: len(events)]
        self._stored += len(events)
        while self._waiting and self._waiting[0][0] <= self._stored:
            _, stored, found = self._waiting.pop(0)
            found[0] = sequence
            stored.set()

    async def _persist(self, data: bytes) -> int:
        while True:
            try:
                return await append_until_known(
                    self._log, self._stream, self._subject, data, within_s=BLOCKED_S
                )
            except LogError as error:
                logger.error("nothing can be appended: %s", error)
                self._blocked()
                await anyio.sleep(RETRY_S)

    def _take(self) -> list[bytes]:
        """Return the events of the next record: at least one, else at most RECORD_BYTES_MAX."""
        size = 0
        for count, event in enumerate(self._queue):
            size += len(event)
            if size > RECORD_BYTES_MAX and count:
                return self._queue[:count]
        return self._queue[:]
