"""The streams in memory, their queues, and their faults."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import permutations
from typing import Protocol

import anyio
import msgspec
from anyio.abc import TaskGroup

from events import subjects as names
from events.contracts import ACK_WAIT_S
from events.log import Conflict, LogError, LogFull, OutcomeUnknown, Stored
from events.wakeup import Wakeup

# The bytes that a message takes in a stream in addition to its subject and data.
MESSAGE_BYTES = 30

# The share of acknowledgements that a broker's restart loses: it writes them to disk only now and then.
FORGOTTEN = 0.2

Handler = Callable[[bytes], Awaitable[bytes]]


class Chance(Protocol):
    """The part of `random.Random` that the faults need."""

    def random(self) -> float: ...

    def uniform(self, a: float, b: float, /) -> float: ...


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """Probabilities of faults (0 to 1), and the longest times in seconds.

    Appends: an `unanswered` one is stored, a `lost` one is not, a `late` one is stored after later ones, a
    `doubled` one is stored again later. `disconnects`: an append loses its connection. Deliveries: a `lying`
    one claims to be the first, `again` repeats one that was acknowledged, `lost_answers` loses an
    acknowledgement.
    """

    append_s: float = 0.0
    unanswered: float = 0.0
    lost: float = 0.0
    late: float = 0.0
    late_s: float = 10.0
    doubled: float = 0.0
    disconnects: float = 0.0
    down_s: float = 3.0
    reader_s: float = 0.0
    reader_restarts: float = 0.0
    restart_s: float = 4.0
    lying: float = 0.0
    again: float = 0.0
    lost_answers: float = 0.0


NO_FAULTS = Faults()


class MemoryBroker:
    """The streams of an installation. `now_ns` is its clock, in Unix nanoseconds."""

    def __init__(
        self,
        tasks: TaskGroup,
        now_ns: Callable[[], int],
        *,
        shards: int = 1,
        chance: Chance | None = None,
        faults: Faults = NO_FAULTS,
    ) -> None:
        assert chance is not None or faults == NO_FAULTS, "faults need a random source"
        self.tasks = tasks
        self.now_ns = now_ns
        self.faults = faults
        # Of all streams; each `Stream` has its own too.
        self.is_full = False
        self.is_unwritable = False
        self.streams: dict[str, Stream] = {}
        for name in (names.FLEET, names.BOOK, names.KEYS, names.SECRETS):
            self.streams[name] = Stream(names.prefix(name))
        for _ in range(shards):
            self.add_shard()
        self.answers: dict[str, list[Answerer]] = {}
        self._chance = chance
        self._connections: list[Connection] = []

    def add_shard(self) -> None:
        """Add the next shard's stream. It is open once the book says so."""
        name = names.shard_stream(self.shards)
        self.streams[name] = Stream(names.prefix(name))

    @property
    def shards(self) -> int:
        """The number of shards that have a stream."""
        return len(self.streams) - len((names.FLEET, names.BOOK, names.KEYS, names.SECRETS))

    def connect(self) -> "Connection":
        connection = Connection()
        self._connections.append(connection)
        return connection

    def happens(self, often: float) -> bool:
        return often > 0 and self._chance is not None and self._chance.random() < often

    def some(self, most_s: float) -> float:
        """Return a time up to `most_s`."""
        return self._chance.uniform(0.0, most_s) if most_s > 0 and self._chance is not None else 0.0

    def restart(self, down_s: float) -> None:
        """Cut every connection, and lose the deliveries that the broker had not written to disk."""
        for connection in self._connections:
            connection.disconnect(down_s)
        for stream in self.streams.values():
            for consumer in stream.consumers.values():
                consumer.restart(self.happens)
            stream.changed.set()

    def stream(self, name: str) -> "Stream":
        if name not in self.streams:
            raise LogError(f"stream {name} does not exist")
        return self.streams[name]

    def store(self, stream: str, subject: str, data: bytes, expect_last: int | None) -> int:
        """Store a message and return its sequence. Raises LogError."""
        target = self.stream(stream)
        if not subject.startswith(target.prefix):
            raise LogError(f"subject {subject} does not belong to {stream}")
        last = target.last.get(subject, 0)
        if expect_last is not None and last != expect_last:
            raise Conflict(
                f"append to {stream}: the last sequence of {subject} is {last}, expected {expect_last}"
            )
        if self.is_full or target.is_full or size_bytes(subject, data) > target.bytes_max - target.size:
            raise LogFull(f"append to {stream}: the stream is full")
        return target.add(subject, data, self.now_ns())


class Connection:
    """One process as the broker sees it: connected or not, running or frozen."""

    def __init__(self) -> None:
        self.epoch = 0
        self.up_at_s = 0.0
        self.is_closed = False
        self._thawed = anyio.Event()
        self._thawed.set()

    @property
    def is_connected(self) -> bool:
        return not self.is_closed and anyio.current_time() >= self.up_at_s

    def disconnect(self, down_s: float) -> None:
        """Lose the connection for a time; messages under way in either direction may be lost."""
        self.epoch += 1
        self.up_at_s = max(self.up_at_s, anyio.current_time() + down_s)

    def freeze(self) -> None:
        """Stop the process at its next use of the log. Deliveries still reach it."""
        if self._thawed.is_set():
            self._thawed = anyio.Event()

    def thaw(self) -> None:
        self._thawed.set()

    def kill(self) -> None:
        """End the process: its tasks that still run here can no longer use the log."""
        self.is_closed = True
        self._thawed = anyio.Event()

    async def thawed(self) -> None:
        """Return once the process runs. Raises OutcomeUnknown on a closed connection."""
        if not self._thawed.is_set():
            await self._thawed.wait()
        if self.is_closed:
            raise OutcomeUnknown("the connection is closed")

    async def running(self) -> None:
        """Return once the process runs and is connected. Raises OutcomeUnknown on a closed connection."""
        await self.thawed()
        if anyio.current_time() < self.up_at_s:
            await anyio.sleep_until(self.up_at_s)
            await self.running()


# More than any test asks at once.
CONCURRENT_MAX = 1000


class Answerer:
    """Answers the questions on a subject, one at a time unless `concurrent`, and none while its process is
    frozen."""

    def __init__(self, connection: Connection, handler: Handler, *, concurrent: bool) -> None:
        self.connection = connection
        self._handler = handler
        self._under_way = anyio.Semaphore(CONCURRENT_MAX if concurrent else 1)

    async def answer(self, data: bytes, answered: list[bytes], first: anyio.Event) -> None:
        """Answer even if the asker no longer waits, as a process does that cannot know."""
        with suppress(OutcomeUnknown):
            async with self._under_way:
                await self.connection.running()
                answer = await self._handler(data)
                await self.connection.running()
            answered.append(answer)
            first.set()


class Stream:
    """One stream's messages from sequence `first`. `changed` wakes its readers at each change.

    `is_unwritable`: as on a disk that cannot be written to, no append is stored or answered, and all else
    works. `is_silent`: as without a leader, appends and questions are not answered, and nothing is delivered.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.first = 1
        self.messages: list[Stored] = []
        self.last: dict[str, int] = {}
        self.size = 0
        self.bytes_max = 1 << 62
        self.is_full = False
        self.is_unwritable = False
        self.is_silent = False
        self.consumers: dict[str, Consumer] = {}
        self.changed = Wakeup()

    def set_silent(self, is_silent: bool) -> None:
        self.is_silent = is_silent
        self.changed.set()

    async def answering(self) -> None:
        """Return once the stream answers."""
        while self.is_silent:
            await self.changed.wait()

    def add(self, subject: str, data: bytes, now_ns: int) -> int:
        sequence = self.last_sequence + 1
        self.messages.append(Stored(subject, sequence, now_ns, data))
        self.last[subject] = sequence
        self.size += size_bytes(subject, data)
        self.changed.set()
        return sequence

    @property
    def last_sequence(self) -> int:
        return self.first + len(self.messages) - 1

    def at(self, sequence: int) -> Stored:
        return self.messages[sequence - self.first]

    def after(self, sequence: int) -> list[Stored]:
        return self.messages[max(0, sequence + 1 - self.first) :]

    def trim(self, up_to: int) -> None:
        many = max(0, up_to + 1 - self.first)
        self.size -= sum(size_bytes(stored.subject, stored.data) for stored in self.messages[:many])
        self.first = max(self.first, min(up_to, self.last_sequence) + 1)
        del self.messages[:many]
        self.last = {subject: last for subject, last in self.last.items() if last >= self.first}
        for consumer in self.consumers.values():
            consumer.trim(self.first)

    def erase(self, sequence: int) -> None:
        """Replace a message by one without subject and data."""
        if not self.first <= sequence <= self.last_sequence or not (gone := self.at(sequence)).subject:
            return
        self.size -= size_bytes(gone.subject, gone.data)
        self.messages[sequence - self.first] = Stored("", sequence, gone.stored_at_ns, b"")
        left = [stored.sequence for stored in self.messages if stored.subject == gone.subject]
        self.last = (
            self.last | {gone.subject: left[-1]}
            if left
            else {subject: last for subject, last in self.last.items() if subject != gone.subject}
        )


def size_bytes(subject: str, data: bytes) -> int:
    return MESSAGE_BYTES + len(subject) + len(data)


class Filter:
    """Match subjects against patterns, and remember the result. Raises LogError if patterns overlap."""

    def __init__(self, subjects: Sequence[str]) -> None:
        self._patterns = [subject.split(".") for subject in subjects]
        for one, other in permutations(self._patterns, 2):
            if _matches(one, other):
                raise LogError(f"subjects overlap: {subjects}")
        self._known: dict[str, bool] = {}

    def __call__(self, subject: str) -> bool:
        if (known := self._known.get(subject)) is None:
            tokens = subject.split(".")
            known = self._known[subject] = any(_matches(pattern, tokens) for pattern in self._patterns)
        return known


def _matches(pattern: Sequence[str], tokens: Sequence[str]) -> bool:
    for index, part in enumerate(pattern):
        if part == ">":
            return len(tokens) > index
        if index == len(tokens) or part not in ("*", tokens[index]):
            return False
    return len(pattern) == len(tokens)


class Consumer:
    """The broker's side of a queue: its deliveries, and until when each may stay unanswered."""

    def __init__(self, stream: Stream, subject: str) -> None:
        self._stream = stream
        self._filter = Filter([subject])
        self._next = 1
        self._due_s: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._given_back: list[int] = []
        self._acked: list[int] = []

    def take(self, now_s: float) -> tuple[Stored, int] | None:
        """Return the next delivery and its count: first messages that are due again, then new ones."""
        again = self._given_back or [sequence for sequence, due_s in self._due_s.items() if due_s <= now_s]
        if again:
            sequence = again[0]
            if self._given_back:
                self._given_back.remove(sequence)
            self._due_s.pop(sequence, None)
            return self._deliver(sequence, now_s)
        while self._next <= self._stream.last_sequence:
            sequence = self._next
            self._next += 1
            if self._filter(self._stream.at(sequence).subject):
                return self._deliver(sequence, now_s)
        return None

    def _deliver(self, sequence: int, now_s: float) -> tuple[Stored, int]:
        self._due_s[sequence] = now_s + ACK_WAIT_S
        count = self._counts[sequence] = self._counts.get(sequence, 0) + 1
        return self._stream.at(sequence), count

    @property
    def unanswered(self) -> list[int]:
        """The messages that were delivered, or given back, and wait for an acknowledgement."""
        return sorted({*self._due_s, *self._given_back})

    def answer(self, sequence: int, word: str, now_s: float, *, delay_s: float = 0.0) -> None:
        """Apply a worker's answer to any delivery of a message, also an older one."""
        if sequence not in self._due_s:
            return
        if word == "in progress":
            self._due_s[sequence] = now_s + ACK_WAIT_S
            return
        if word == "give back" and delay_s:
            self._due_s[sequence] = now_s + delay_s
            return
        del self._due_s[sequence]
        if word == "ack":
            self._acked.append(sequence)
        else:
            self._given_back.append(sequence)
            self._stream.changed.set()

    def deliver_again(self, sequence: int) -> None:
        """Forget that a message was acknowledged."""
        if sequence in self._acked:
            self._acked.remove(sequence)
            self._counts.pop(sequence, None)
            self._given_back.append(sequence)

    def trim(self, first: int) -> None:
        """Forget all messages before `first`, answered or not."""
        self._next = max(self._next, first)
        self._due_s = {sequence: due_s for sequence, due_s in self._due_s.items() if sequence >= first}
        self._given_back = [sequence for sequence in self._given_back if sequence >= first]
        self._acked = [sequence for sequence in self._acked if sequence >= first]

    def restart(self, happens: Callable[[float], bool]) -> None:
        """Reset the counts and deliver again, even some messages that were acknowledged."""
        forgotten = [sequence for sequence in self._acked if happens(FORGOTTEN)]
        self._given_back += [sequence for sequence in self._due_s if sequence not in self._given_back]
        self._due_s.clear()
        self._counts.clear()
        for sequence in forgotten:
            self.deliver_again(sequence)
