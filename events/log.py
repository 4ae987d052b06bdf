"""The log as the rest of Rift sees it; `jetstream/` is the real one, `memory/` its twin.

A *position* is a stream's sequence and an index in the record. Sequences of one stream only grow;
an append that returned is durable; readers see every stored message of their subjects, in order.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Protocol

import anyio
import msgspec

from events import codec
from events.clock import now_s
from events.errors import EventsError
from events.subjects import Address

# The broker answers an append in under a millisecond; after two seconds it is restarting or cut off.
APPEND_TIMEOUT_S = 2.0

# How long any other single request may take.
API_TIMEOUT_S = 5.0

# A whole day's log of one lane takes seconds to read; after this time the broker is not answering.
SCAN_TIMEOUT_S = 30.0

# The states of a server that holds a stream, the best first.
SERVER_STATES = ("leader", "current", "behind", "silent", "leaderless")


class LogError(EventsError):
    """The log could not perform an operation."""


class OutcomeUnknown(LogError):
    """The append may or may not be stored, now or later. Repeating the identical record is safe."""


class LogFull(LogError):
    """The log refused the append and stored nothing."""


class RecordTooLarge(LogError):
    """The record is larger than the broker accepts; nothing was stored."""


class Conflict(LogError):
    """The subject's last sequence is not the expected one; nothing was stored."""


class ForeignDelivery(LogError):
    """A job's ack names another queue, or none: whoever stored it made a mistake, or wants to do harm."""


class NoResponders(LogError):
    """No process answers on this subject."""


class Stored(msgspec.Struct, frozen=True, gc=False):
    """One message as the log holds it. `stored_at_ns` is the broker's clock, Unix nanoseconds."""

    subject: str
    sequence: int
    stored_at_ns: int
    data: bytes


# Receives the sequence of a stored record, or why it may not be stored. It must not raise.
Settled = Callable[[int | LogError], None]


class Job(msgspec.Struct, frozen=True, gc=False):
    """One delivery of a `RequestAccepted` to a worker. `ack` is the subject that answers it.

    `deliveries` is a hint: after a broker's crash it starts again at 1. `epoch` is the number of
    times the connection had been lost when the job came.
    """

    stored: Stored
    ack: str
    deliveries: int
    epoch: int


class Follower(Protocol):
    """A live, ordered, gapless view of some subjects of one stream."""

    @property
    def position(self) -> int:
        """The sequence up to which the reader has handed out everything."""

    def __aiter__(self) -> AsyncIterator[Sequence[Stored]]:
        """Yield new messages in order, in batches of at least one."""

    def hurry(self) -> None:
        """Hand out the next batch at once, regardless of `pace_s`."""


class Jobs(Protocol):
    """A worker's share of one model's queue on one shard."""

    def __aiter__(self) -> AsyncIterator[Job]: ...

    def want(self, slots: int) -> None:
        """Ask for at most `slots` further jobs."""


class Log(Protocol):
    """One connection. `epoch` counts how often it was lost, `reader_gaps` how often a live reader missed
    records, or may have, and read on from where it was."""

    @property
    def epoch(self) -> int: ...

    @property
    def reader_gaps(self) -> int: ...

    @property
    def is_connected(self) -> bool: ...

    async def streams(self) -> set[str]:
        """Return the names of the streams that exist."""

    async def append(self, stream: str, subject: str, data: bytes, *, expect_last: int | None = None) -> int:
        """Store durably and return the sequence. `expect_last` is the last sequence the subject must
        have (0: none). Raises OutcomeUnknown, LogFull, Conflict."""

    def begin_append(self, stream: str, subject: str, data: bytes, settled: Settled) -> bool:
        """Begin an append without a task that waits; return whether it has begun.

        `settled` is called once, where the connection is read: with the sequence, or with the error that
        `append` would raise. If the append cannot begin at once, nothing was sent, and `append` has to wait.
        """

    @property
    def has_unsent(self) -> bool:
        """Whether bytes of this connection wait because the operating system takes no more.

        Without any, an append that has begun reaches the broker even if this process is killed now, but not
        if the network or the broker fails too.
        """

    def unwritable_s(self, stream: str) -> float:
        """Return for how long appends of this connection to the stream have waited or failed without one
        that was stored; 0 if none has."""

    def time_appends(self, took: Callable[[int], None]) -> None:
        """Call `took` from now on for each append that is stored, with the nanoseconds from its begin to the
        answer. It must be quick, and must not raise."""

    async def last_sequence(self, stream: str, subject: str | None = None) -> int:
        """Return the stream's (or a subject's) last sequence as the stream's leader states it; 0: none."""

    async def last(self, stream: str, subject: str) -> Stored | None:
        """Return the last message of the subjects that match, as the stream's leader states it."""

    async def first_sequence(self, stream: str) -> int:
        """Return the first sequence that the stream holds; one past its last if it holds none."""

    async def trim(self, stream: str, up_to: int) -> None:
        """Remove everything up to and including a sequence, for ever; numbers continue as before.

        A reader that lags continues with the rest and gets no notice, so the caller must know its readers.
        """

    async def get(self, stream: str, sequence: int) -> Stored | None:
        """Return one message as the stream's leader states it; None if it does not exist or was removed."""

    async def erase(self, stream: str, sequence: int) -> None:
        """Remove one message and overwrite it on disk, in a stream that allows deletes.

        Does nothing if there is no such message.
        """

    async def room_bytes(self, stream: str) -> int:
        """Return how many more bytes the stream can hold."""

    async def capacity_bytes(self, stream: str) -> int:
        """Return how many bytes the stream can hold in total."""

    async def stream_servers(self, stream: str) -> Mapping[str, str]:
        """Return each server that holds the stream, as leader, current, behind or silent, or all as
        leaderless. The result is empty for a broker of one server."""

    def follow(
        self, stream: str, subjects: Sequence[str], *, after: int, pace_s: float = 0.0
    ) -> AbstractAsyncContextManager[Follower]:
        """Follow from the first message after `after`. On entry the broker has confirmed the reader.

        With `pace_s` the reader hands out a batch at most that often, and costs much less under load.
        """

    def scan(
        self, stream: str, subjects: Sequence[str], *, first: int, target: int
    ) -> AsyncGenerator[Sequence[Stored], None]:
        """Yield the subjects' messages from sequence `first` to `target`.

        Ends only once `target` (a sequence of these subjects) was read, or was trimmed with everything before
        it.
        """

    def jobs(self, shard: int, model: str) -> AbstractAsyncContextManager[Jobs]: ...

    async def ack(self, ack: str) -> None: ...

    async def in_progress(self, ack: str) -> None: ...

    async def give_back(self, ack: str, *, delay_s: float = 0.0, of: Address | None = None) -> None:
        """Return a job, to be delivered again at once or after `delay_s`.

        With `of`, raises ForeignDelivery if it is no job of the queue of that address.
        """

    async def ask(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        """Send a question to a subject outside all streams, and return the first answer.

        Raises NoResponders at once if no process answers there, LogError if none does in time.
        """

    def answer(
        self, subject: str, handler: Callable[[bytes], Awaitable[bytes]], *, concurrent: bool = False
    ) -> AbstractAsyncContextManager[None]:
        """Answer questions on `subject`, one at a time or `concurrent`, while the context is open.

        A concurrent handler bounds how many questions it accepts. It must not raise.

        If several processes answer, every one receives the question, so one that hangs cannot block the rest.
        """


# The pause between two tries of the same record; most of the wait is the append's own timeout.
REPEAT_S = 0.1


async def append_until_known(log: Log, stream: str, subject: str, data: bytes, *, within_s: float) -> int:
    """Repeat the identical record until its outcome is known, and return the sequence of the last.

    The record may be stored more than once: the fold ignores repeats. Raises OutcomeUnknown after
    `within_s`; LogFull at once, if nothing can have been stored.
    """
    deadline = now_s() + within_s
    unknown: OutcomeUnknown | None = None
    while True:
        try:
            return await log.append(stream, subject, data)
        except OutcomeUnknown as error:
            unknown = error
        except LogFull:
            # An earlier try may be stored, or will be once there is space again.
            if unknown is None:
                raise
        if now_s() > deadline:
            raise unknown
        await anyio.sleep(REPEAT_S)


def worst_states(streams: Iterable[Mapping[str, str]]) -> Mapping[str, str]:
    """Return the worst state of each server over streams."""
    worst: dict[str, str] = {}
    for servers in streams:
        for server, state in servers.items():
            worst[server] = max(worst.get(server, state), state, key=SERVER_STATES.index)
    return dict(sorted(worst.items()))


async def last_with_events(log: Log, stream: str, subject: str) -> Stored | None:
    """Return the subject's last record that is no answer of the broker. Raises LogError."""
    found = await log.last(stream, subject)
    if found is None or not _is_empty(found):
        return found
    target, found = found.sequence, None
    async with aclosing(log.scan(stream, [subject], first=1, target=target)) as batches:
        async for batch in batches:
            found = next((stored for stored in reversed(batch) if not _is_empty(stored)), found)
    return found


def _is_empty(stored: Stored) -> bool:
    try:
        return not codec.decode(stored.data, stored.subject)[1]
    except codec.RecordUnreadable:
        return False
