"""The one writer of a worker's answers on a lane: group commit with one append in flight.

Whatever the lane's requests produce while an append waits for its acknowledgement is the next record,
one event for each request. So order is certain, and a retry is the identical record.

    start or release of an attempt, an answer's first tokens    appended at once
    further tokens, the end                                     at once too, unless an append began less
                                                                than PACE_S ago

So the first tokens of an answer, and every step of a model whose steps take longer than PACE_S, are not
held back, and a model that is faster does not cost more than the log and its readers can bear.
"""

import logging
from collections.abc import Callable
from typing import Protocol

import anyio

from events import codec
from events.encryption import Cipher
from events.log import Log, LogError, append_until_known
from events.schema import AnyEvent, TokensGenerated

logger = logging.getLogger(__name__)

# A quarter of a screen's frame, and less than a step of any model that is worth its hardware: nobody
# notices, and each record costs its fsync and a wake-up of everybody who reads. A little less than whole
# milliseconds, which is what uvloop counts: a deadline a hair behind one is polled for until the next.
PACE_S = 0.0038

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


class SealedWriter:
    """The writer of a sealed request's attempt."""

    def __init__(self, writer: Writer, seal: Cipher) -> None:
        self._writer = writer
        self._seal = seal

    def put(self, *events: AnyEvent) -> None:
        self._writer.put(*(self._seal.closed(event) for event in events))

    async def put_durably(self, event: AnyEvent) -> int:
        return await self._writer.put_durably(self._seal.closed(event))


class LaneWriter:
    def __init__(
        self, log: Log, stream: str, subject: str, *, name: str, blocked: Callable[[], None]
    ) -> None:
        self._log = log
        self._stream = stream
        self._subject = subject
        self._name = name
        self._blocked = blocked
        self._queue: list[list[AnyEvent]] = []
        self._growing: dict[str, list[AnyEvent]] = {}
        self._waiting: list[tuple[int, anyio.Event, list[int]]] = []
        self._stored = 0
        self._wake = anyio.Event()
        self._hurry = anyio.Event()
        self._idle = anyio.Event()

    def put(self, *events: AnyEvent) -> None:
        first, *rest = events
        tokens = first if isinstance(first, TokensGenerated) else None
        # What is sealed cannot be joined.
        grows = tokens is not None and not tokens.content
        if tokens is not None and grows and (entry := self._growing.get(tokens.attempt)) is not None:
            entry[:] = [_joined(entry[0], tokens), *rest]
        else:
            self._queue.append(entry := [*events])
            if tokens is not None and grows:
                self._growing[tokens.attempt] = entry
        if tokens is None or tokens.index == 0:
            self._hurry.set()
        self._wake.set()

    async def put_durably(self, event: AnyEvent) -> int:
        self.put(event)
        stored = anyio.Event()
        sequence = [0]
        self._waiting.append((self._stored + len(self._queue), stored, sequence))
        await stored.wait()
        return sequence[0]

    async def run(self) -> None:
        """Append for as long as the worker lives; `blocked` is called while the log takes nothing."""
        while True:
            while self._queue:
                next_at = anyio.current_time() + PACE_S
                await self._append()
                if not self._hurry.is_set():
                    with anyio.move_on_at(next_at):
                        await self._hurry.wait()
            self._idle.set()
            await self._wake.wait()
            self._wake = anyio.Event()

    async def flushed(self) -> None:
        """Wait until everything that was put is stored."""
        while self._queue:
            self._idle = anyio.Event()
            await self._idle.wait()

    async def _append(self) -> None:
        self._hurry = anyio.Event()
        taken = self._take()
        sequence = await self._persist(codec.join(self._name, taken))
        del self._queue[: len(taken)]
        self._stored += len(taken)
        while self._waiting and self._waiting[0][0] <= self._stored:
            _, stored, found = self._waiting.pop(0)
            found[0] = sequence
            stored.set()

    def _take(self) -> list[bytes]:
        """Return the next record's entries, encoded: at least one, else at most RECORD_BYTES_MAX."""
        self._growing.clear()
        taken: list[bytes] = []
        size = 0
        for entry in self._queue:
            encoded = b",".join([codec.encode_event(event) for event in entry])
            size += len(encoded)
            if size > RECORD_BYTES_MAX and taken:
                self._hurry.set()
                break
            taken.append(encoded)
        return taken

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


def sealed(writer: LaneWriter, seal: Cipher | None) -> Writer:
    return writer if seal is None else SealedWriter(writer, seal)


def _joined(first: AnyEvent, then: TokensGenerated) -> TokensGenerated:
    assert isinstance(first, TokensGenerated), "only tokens grow"
    return TokensGenerated(
        attempt=first.attempt,
        index=first.index,
        token_ids=first.token_ids + then.token_ids,
        text=first.text + then.text,
        cached_tokens=first.cached_tokens + then.cached_tokens,
        reasoning=first.reasoning + then.reasoning,
        tool_calls=first.tool_calls + then.tool_calls,
        logprobs=first.logprobs + then.logprobs,
    )
