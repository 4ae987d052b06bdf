"""The one writer of a worker's answers on a lane: group commit with one append in flight.

Everything that the lane's requests produce while an append waits for its acknowledgement becomes the next
record, one event for each request. So order is certain, and a retry is the identical record.

    start or release of an attempt, an answer's first tokens    appended at once
    further tokens, the end                                     appended at once too, unless an append began
                                                                less than PACE_S ago

So the first tokens of an answer, and every step of a model whose steps take longer than PACE_S, are not
delayed, and a faster model costs no more than the log and its readers can bear.
"""

import logging
from collections.abc import Callable
from typing import Protocol

import anyio
import msgspec

from events import codec, subjects
from events.contracts import TOKEN_RECORD_BYTES_MAX
from events.encryption import Cipher
from events.log import Log, LogError, append_until_known
from events.schema import AnyEvent, TokensGenerated
from events.wakeup import Wakeup

logger = logging.getLogger(__name__)

# A quarter of a screen's frame, and less than a step of any model that is worth its hardware: users do not
# notice it, and each record costs an fsync and a wake-up of every reader. It is slightly below whole
# milliseconds, which uvloop counts in: it would poll for a deadline just past one until the next.
PACE_S = 0.0038

# A broker restarts in a second or two. A worker that cannot append for longer than this stops generating.
BLOCKED_S = 5.0
RETRY_S = 1.0


class AttemptWriter(Protocol):
    """The part of a lane's writer that an attempt uses."""

    def put(self, *events: AnyEvent) -> None:
        """Queue events after all earlier ones; together they are stored, or not."""

    async def put_durably(self, event: AnyEvent) -> int:
        """Queue an event and return the sequence of its record once it is stored."""


class SealedWriter:
    """The writer of an attempt whose content is encrypted."""

    def __init__(self, writer: AttemptWriter, cipher: Cipher) -> None:
        self._writer = writer
        self._cipher = cipher

    def put(self, *events: AnyEvent) -> None:
        self._writer.put(*(self._cipher.closed(event) for event in events))

    async def put_durably(self, event: AnyEvent) -> int:
        return await self._writer.put_durably(self._cipher.closed(event))


class _DurableEntry(msgspec.Struct):
    """A caller that waits until the entry of this number is stored. `sequence` is then its record's."""

    number: int
    stored: anyio.Event
    sequence: int = 0


class LaneWriter:
    """Appends to the lane of `at`. `blocked` is called for as long as the log accepts nothing."""

    def __init__(self, log: Log, at: subjects.Address, *, name: str, blocked: Callable[[], None]) -> None:
        self._log = log
        self._at = at
        self._name = name
        self._blocked = blocked
        self._queue: list[list[AnyEvent]] = []
        self._growing: dict[str, list[AnyEvent]] = {}
        self._durable: list[_DurableEntry] = []
        self._stored = 0
        self._filled = Wakeup()
        self._drained = Wakeup()
        self._hurry = anyio.Event()

    def put(self, *events: AnyEvent) -> None:
        first, *rest = events
        tokens = first if isinstance(first, TokensGenerated) else None
        # Sealed events cannot be joined.
        grows = tokens is not None and not tokens.content
        if tokens is not None and grows and (entry := self._growing.get(tokens.attempt)) is not None:
            entry[:] = [_joined(entry[0], tokens), *rest]
        else:
            if not self._queue:
                self._filled.set()
            self._queue.append(entry := [*events])
            if tokens is not None and grows:
                self._growing[tokens.attempt] = entry
        if tokens is None or tokens.index == 0:
            self._hurry.set()

    async def put_durably(self, event: AnyEvent) -> int:
        self.put(event)
        entry = _DurableEntry(self._stored + len(self._queue), anyio.Event())
        self._durable.append(entry)
        await entry.stored.wait()
        return entry.sequence

    async def run(self) -> None:
        """Append for as long as the worker lives."""
        while True:
            while self._queue:
                next_at_s = anyio.current_time() + PACE_S
                await self._append()
                if not self._hurry.is_set():
                    with anyio.move_on_at(next_at_s):
                        await self._hurry.wait()
            self._drained.set()
            await self._filled.wait()

    async def flushed(self) -> None:
        """Wait until everything that was put is stored."""
        while self._queue:
            await self._drained.wait()

    async def _append(self) -> None:
        # An event, not a Wakeup: an entry that hurries during this append must speed up the next one.
        self._hurry = anyio.Event()
        entries = self._next_entries()
        sequence = await self._persist(codec.join(self._name, entries))
        del self._queue[: len(entries)]
        self._stored += len(entries)
        while self._durable and self._durable[0].number <= self._stored:
            entry = self._durable.pop(0)
            entry.sequence = sequence
            entry.stored.set()

    def _next_entries(self) -> list[bytes]:
        """Return the next record's entries, encoded: at least one, else at most TOKEN_RECORD_BYTES_MAX."""
        self._growing.clear()
        entries: list[bytes] = []
        size = 0
        for entry in self._queue:
            encoded = b",".join([codec.encode_event(event) for event in entry])
            size += len(encoded)
            if size > TOKEN_RECORD_BYTES_MAX and entries:
                self._hurry.set()
                break
            entries.append(encoded)
        return entries

    async def _persist(self, data: bytes) -> int:
        stream = subjects.shard_stream(self._at.shard)
        subject = subjects.work(self._at)
        is_logged = False
        while True:
            try:
                return await append_until_known(self._log, stream, subject, data, within_s=BLOCKED_S)
            except LogError as error:
                if not is_logged:
                    logger.error("%s accepts no records, trying again until it does: %s", subject, error)
                is_logged = True
                self._blocked()
                await anyio.sleep(RETRY_S)


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
