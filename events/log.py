"""The log as the rest of Rift sees it; `jetstream/` is the real one, `memory/` its twin.

A *position* is a stream's sequence and an index in the record. Sequences of one stream only grow;
an append that returned is durable; readers see every stored message of their subjects, in order.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import anyio
import msgspec

from events.errors import EventsError

# The broker answers an append in under a millisecond; after two seconds it is restarting or cut off.
APPEND_TIMEOUT_S = 2.0

# How long any other single request may take.
API_TIMEOUT_S = 5.0

# A whole day's log of one lane takes seconds to read; after this time the broker is not answering.
SCAN_TIMEOUT_S = 30.0


class LogError(EventsError):
    """The log could not do what was asked."""


class OutcomeUnknown(LogError):
    """The append may or may not be stored, now or later. Repeating the identical record is safe."""


class LogFull(LogError):
    """The log refused the append and stored nothing."""


class RecordTooLarge(LogError):
    """No message of this size is stored; nothing was."""


class Conflict(LogError):
    """The subject's last sequence is not the expected one; nothing was stored."""


class NoResponders(LogError):
    """Nobody is there who would answer this question."""


class Stored(msgspec.Struct, frozen=True, gc=False):
    """One message as the log holds it. `stored_at_ns` is the broker's clock, Unix nanoseconds."""

    subject: str
    sequence: int
    stored_at_ns: int
    data: bytes


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
        """The sequence up to which everything was handed out."""

    def __aiter__(self) -> AsyncIterator[Sequence[Stored]]:
        """Yield what came since, in order, in batches of at least one."""

    def hurry(self) -> None:
        """Hand out the next batch at once, whatever the pace."""


class Jobs(Protocol):
    """A worker's share of one model's queue on one shard."""

    def __aiter__(self) -> AsyncIterator[Job]: ...

    def want(self, slots: int) -> None:
        """Ask for at most so many jobs beyond those that were handed out."""


class Log(Protocol):
    """One connection. `epoch` counts how often it was lost."""

    @property
    def epoch(self) -> int: ...

    @property
    def is_connected(self) -> bool: ...

    async def append(self, stream: str, subject: str, data: bytes, *, expect_last: int | None = None) -> int:
        """Store durably and return the sequence. `expect_last` is the last sequence the subject must
        have (0: none). Raises OutcomeUnknown, LogFull, Conflict."""

    async def last_sequence(self, stream: str, subject: str | None = None) -> int:
        """Return the stream's (or a subject's) last sequence as the stream's leader states it; 0: none."""

    async def last(self, stream: str, subject: str) -> Stored | None:
        """Return the last message of a subject, or of all it stands for, as the stream's leader states it."""

    async def first_sequence(self, stream: str) -> int:
        """Return the first sequence that the stream still holds; one past its last, if it holds none."""

    async def trim(self, stream: str, up_to: int) -> None:
        """Remove everything up to and including a sequence, for ever; numbers go on as before.

        A reader that is behind goes on with what is left, and is not told: who trims knows its readers.
        """

    async def get(self, stream: str, sequence: int) -> Stored | None:
        """Return one message as the stream's leader states it; None if it is not there, or not any more."""

    async def erase(self, stream: str, sequence: int) -> None:
        """Remove one message of a stream that lets go of them, and overwrite it on disk. Of one that is not
        there nothing is left to erase."""

    async def room_bytes(self, stream: str) -> int:
        """Return how many bytes the stream still takes."""

    async def capacity_bytes(self, stream: str) -> int:
        """Return how many bytes the stream takes in all."""

    def follow(
        self, stream: str, subjects: Sequence[str], *, after: int, pace_s: float = 0.0
    ) -> AbstractAsyncContextManager[Follower]:
        """Follow from the first message behind `after`. On entry the reader is confirmed.

        With `pace_s` it hands out a batch at most that often, and costs much less under load.
        """

    def scan(
        self, stream: str, subjects: Sequence[str], *, first: int, target: int
    ) -> AsyncGenerator[Sequence[Stored], None]:
        """Yield what the subjects hold from sequence `first` to `target`, and end only once `target`
        (a sequence of these subjects) was read, or is trimmed and so all before it."""

    def jobs(self, shard: int, model: str) -> AbstractAsyncContextManager[Jobs]: ...

    async def ack(self, ack: str) -> None: ...

    async def in_progress(self, ack: str) -> None: ...

    async def give_back(self, ack: str, *, delay_s: float = 0.0) -> None:
        """Return a delivery, to be made again at once or after `delay_s`."""

    async def ask(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        """Ask whoever answers on `subject`, in no stream, and return the first answer. Raises NoResponders
        at once where nobody would, LogError where nobody does in time."""

    def answer(
        self, subject: str, handler: Callable[[bytes], Awaitable[bytes]]
    ) -> AbstractAsyncContextManager[None]:
        """Answer questions on `subject`, one at a time, while the context is open. Of several who answer,
        each is asked: one that hangs must not keep questions from the others."""


# Between two tries of the same record; the append's own timeout is most of the wait.
REPEAT_S = 0.1


async def append_until_known(log: Log, stream: str, subject: str, data: bytes, *, within_s: float) -> int:
    """Repeat the identical record until its outcome is known, and return the sequence of the last.

    The record may be stored more than once: the fold ignores repeats. Raises OutcomeUnknown after
    `within_s`; LogFull at once, if nothing can have been stored.
    """
    deadline = anyio.current_time() + within_s
    unknown: OutcomeUnknown | None = None
    while True:
        try:
            return await log.append(stream, subject, data)
        except OutcomeUnknown as error:
            unknown = error
        except LogFull:
            # An earlier try may be stored, or land when there is room again.
            if unknown is None:
                raise
        if anyio.current_time() > deadline:
            raise unknown
        await anyio.sleep(REPEAT_S)
