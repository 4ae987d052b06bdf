"""The one writer of a worker's answers on a lane: group commit with one append in flight.

Everything that the lane's requests produce while an append waits for its acknowledgement becomes the next
record, one event for each request. So order is certain, and a retry is the identical record.

    start, release or lone end of an attempt, first tokens    appended at once
    further tokens, with the end or without                   appended at once too, unless an append began
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
from events.clock import now_s
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
        """Queue events after all earlier ones, and append them; together they are stored, or not."""

    def add(self, *events: AnyEvent) -> None:
        """As `put`, but leave the append to the end of the engine's step."""

    def put_tracked(self, event: AnyEvent, doubted: Callable[[], None] | None = None) -> "Receipt":
        """Put an event and return its receipt. `doubted` is called if its record was sent and may be lost."""


class Receipt:
    """How far one event has come.

    `sent`: the log's connection has its record. It is set at the latest once the record is stored.
    """

    def __init__(self, doubted: Callable[[], None] | None) -> None:
        self.sent = anyio.Event()
        self.doubted = doubted
        self._stored = anyio.Event()
        self._sequence = 0

    async def stored(self) -> int:
        """Return the sequence of the record once it is stored."""
        await self._stored.wait()
        return self._sequence

    def settle(self, sequence: int) -> None:
        self._sequence = sequence
        self.sent.set()
        self._stored.set()


class SealedWriter:
    """The writer of an attempt whose content is encrypted."""

    def __init__(self, writer: AttemptWriter, cipher: Cipher) -> None:
        self._writer = writer
        self._cipher = cipher

    def put(self, *events: AnyEvent) -> None:
        self._writer.put(*(self._cipher.closed(event) for event in events))

    def add(self, *events: AnyEvent) -> None:
        self._writer.add(*(self._cipher.closed(event) for event in events))

    def put_tracked(self, event: AnyEvent, doubted: Callable[[], None] | None = None) -> Receipt:
        return self._writer.put_tracked(self._cipher.closed(event), doubted)


class _Entry(msgspec.Struct):
    """Events that are stored together."""

    events: list[AnyEvent]
    receipt: Receipt | None = None


class _InFlight(msgspec.Struct):
    """The record that is being appended: the first `entries` of the queue. With `needs_task` it failed, or
    could not begin at once."""

    data: bytes
    entries: int
    needs_task: bool = False


class LaneWriter:
    """Appends to the lane of `at`. `blocked` is called for as long as the log accepts nothing.

    Nearly every record is sent by the call that queued it, and the next one by the acknowledgement. Only what
    has to wait, for the pace or for the log, is left to the task in `run`.
    """

    def __init__(self, log: Log, at: subjects.Address, *, name: str, blocked: Callable[[], None]) -> None:
        self._log = log
        self._stream = subjects.shard_stream(at.shard)
        self._subject = subjects.work(at)
        self._name = name
        self._blocked = blocked
        self._queue: list[_Entry] = []
        self._growing: dict[str, _Entry] = {}
        self._in_flight: _InFlight | None = None
        self._next_at_s = 0.0
        self._hurries = False
        self._waits = Wakeup()
        self._drained = Wakeup()

    def put(self, *events: AnyEvent) -> None:
        self._add([*events])
        self.flush()

    def add(self, *events: AnyEvent) -> None:
        self._add([*events])

    def put_tracked(self, event: AnyEvent, doubted: Callable[[], None] | None = None) -> Receipt:
        receipt = self._add([event]).receipt = Receipt(doubted)
        self.flush()
        return receipt

    def discard(self, attempt: str) -> None:
        """Forget the tokens of an attempt that are not being appended yet."""
        first = 0 if self._in_flight is None else self._in_flight.entries
        self._queue[first:] = [entry for entry in self._queue[first:] if not _is_of(entry.events[0], attempt)]
        self._growing.pop(attempt, None)

    def _add(self, events: list[AnyEvent]) -> _Entry:
        first = events[0]
        tokens = first if isinstance(first, TokensGenerated) else None
        if tokens is None or tokens.index == 0:
            self._hurries = True
        # Sealed events cannot be joined.
        grows = tokens is not None and not tokens.content
        if tokens is not None and grows and (entry := self._growing.get(tokens.attempt)) is not None:
            entry.events[:] = [_joined(entry.events[0], tokens), *events[1:]]
            return entry
        entry = _Entry(events)
        self._queue.append(entry)
        if tokens is not None and grows:
            self._growing[tokens.attempt] = entry
        return entry

    def flush(self) -> None:
        """Append what is queued, unless a record is in flight or the pace says later."""
        if self._in_flight is None and self._queue:
            if self._hurries or now_s() >= self._next_at_s:
                self._begin()
            else:
                self._waits.set()

    async def run(self) -> None:
        """Append what has to wait, for as long as the worker lives."""
        while True:
            waits = self._waits.pending
            if self._in_flight is not None and self._in_flight.needs_task:
                self._advance(await self._persist(self._in_flight.data))
            elif self._in_flight is None and self._queue:
                due_at_s = self._next_at_s
                await anyio.sleep_until(due_at_s)
                # Otherwise an entry that hurries has begun an append meanwhile.
                if self._in_flight is None and self._queue and self._next_at_s == due_at_s:
                    self._begin()
            else:
                await waits.wait()

    async def flushed(self) -> None:
        """Wait until everything that was put is stored."""
        self.flush()
        while self._queue:
            await self._drained.wait()

    def _begin(self) -> None:
        self._hurries = False
        self._next_at_s = now_s() + PACE_S
        entries = self._next_entries()
        record = self._in_flight = _InFlight(codec.join(self._name, entries), len(entries))
        if not self._log.begin_append(self._stream, self._subject, record.data, self._settled):
            self._leave_to_task(record)
            return
        for entry in self._queue[: record.entries]:
            if entry.receipt is not None:
                entry.receipt.sent.set()

    def _settled(self, outcome: int | LogError) -> None:
        record = self._in_flight
        assert record is not None, "one append is in flight until it is settled"
        if not isinstance(outcome, LogError):
            self._advance(outcome)
            return
        self._leave_to_task(record)
        for entry in self._queue[: record.entries]:
            if entry.receipt is not None and entry.receipt.doubted is not None:
                entry.receipt.doubted()

    def _leave_to_task(self, record: _InFlight) -> None:
        record.needs_task = True
        self._waits.set()

    def _advance(self, sequence: int) -> None:
        """Note that the record in flight is stored, and append the next one."""
        assert self._in_flight is not None, "one append is in flight until it is settled"
        stored = self._queue[: self._in_flight.entries]
        del self._queue[: self._in_flight.entries]
        self._in_flight = None
        for entry in stored:
            if entry.receipt is not None:
                entry.receipt.settle(sequence)
        if self._queue:
            self.flush()
        else:
            self._drained.set()

    def _next_entries(self) -> list[bytes]:
        """Return the next record's entries, encoded: at least one, else at most TOKEN_RECORD_BYTES_MAX."""
        self._growing.clear()
        entries: list[bytes] = []
        size = 0
        for entry in self._queue:
            encoded = b",".join([codec.encode_event(event) for event in entry.events])
            size += len(encoded)
            if size > TOKEN_RECORD_BYTES_MAX and entries:
                self._hurries = True
                break
            entries.append(encoded)
        return entries

    async def _persist(self, data: bytes) -> int:
        is_logged = False
        while True:
            try:
                return await append_until_known(
                    self._log, self._stream, self._subject, data, within_s=BLOCKED_S
                )
            except LogError as error:
                if not is_logged:
                    logger.error(
                        "%s accepts no records, trying again until it does: %s", self._subject, error
                    )
                is_logged = True
                self._blocked()
                await anyio.sleep(RETRY_S)


def _is_of(event: AnyEvent, attempt: str) -> bool:
    return isinstance(event, TokensGenerated) and event.attempt == attempt


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
