"""The streams in memory, their queues, and what goes wrong with them."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import permutations
from typing import Protocol

import anyio
import msgspec
from anyio.abc import TaskGroup

from events import subjects as names
from events.log import Conflict, LogError, LogFull, OutcomeUnknown, Stored

# As the real broker has it.
ACK_WAIT_S = 5.0

# What a message takes in a stream beside its subject and its data.
MESSAGE_BYTES = 30

# The share of acknowledgements that a broker's restart forgets: it writes them down now and then.
FORGOTTEN = 0.2

Handler = Callable[[bytes], Awaitable[bytes]]


class Chance(Protocol):
    """What of `random.Random` the faults need."""

    def random(self) -> float: ...

    def uniform(self, a: float, b: float, /) -> float: ...


class Faults(msgspec.Struct, frozen=True, kw_only=True):
    """How often (of 1) something goes wrong, and how long at most, in seconds, what takes time takes.

    Of an append: `unanswered` is stored, `lost` is not, `late` is stored once later ones were, `doubled`
    is stored again later. Of a delivery: `lying` says that it is the first, `again` comes although it was
    answered. `lost_answers` is about acknowledgements, `disconnects` about the connection with an append.
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
    """The streams of an installation. `now_ns` is its clock, Unix nanoseconds."""

    def __init__(
        self,
        tasks: TaskGroup,
        now_ns: Callable[[], int],
        *,
        shards: int = 1,
        chance: Chance | None = None,
        faults: Faults = NO_FAULTS,
    ) -> None:
        assert chance is not None or faults == NO_FAULTS, "faults take a random source"
        self.tasks = tasks
        self.now_ns = now_ns
        self.faults = faults
        self.is_full = False
        self.streams = {names.shard_stream(shard): Stream(f"rift.{shard}.") for shard in range(shards)}
        self.streams |= {names.FLEET: Stream("rift.fleet."), names.BOOK: Stream("rift.book.")}
        self.streams |= {names.KEYS: Stream("rift.keys."), names.SECRETS: Stream("rift.secret.")}
        self.answers: dict[str, list[Answerer]] = {}
        self._chance = chance
        self._connections: list[Connection] = []

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
        """Every connection is lost; of the deliveries, the broker knows only what it wrote down."""
        for connection in self._connections:
            connection.disconnect(down_s)
        for stream in self.streams.values():
            for consumer in stream.consumers.values():
                consumer.restart(self.happens)
            stream.changed_now()

    def stream(self, name: str) -> "Stream":
        if name not in self.streams:
            raise LogError(f"there is no stream {name}")
        return self.streams[name]

    def store(self, stream: str, subject: str, data: bytes, expect_last: int | None) -> int:
        """Raises LogError."""
        held = self.stream(stream)
        if not subject.startswith(held.prefix):
            raise LogError(f"{subject} is not of {stream}")
        if expect_last is not None and held.last.get(subject, 0) != expect_last:
            raise Conflict(
                f"append to {stream}: the last sequence of {subject} is {held.last.get(subject, 0)}"
            )
        if self.is_full or size_bytes(subject, data) > held.bytes_max - held.size:
            raise LogFull(f"append to {stream}: it is full")
        return held.add(subject, data, self.now_ns())


class Connection:
    """One process as the broker sees it: connected or not, running or frozen."""

    def __init__(self) -> None:
        self.epoch = 0
        self.up_at = 0.0
        self.is_closed = False
        self._thawed = anyio.Event()
        self._thawed.set()

    @property
    def is_connected(self) -> bool:
        return not self.is_closed and anyio.current_time() >= self.up_at

    def disconnect(self, down_s: float) -> None:
        """Lose the connection for a time; what was on its way in either direction may be lost."""
        self.epoch += 1
        self.up_at = max(self.up_at, anyio.current_time() + down_s)

    def freeze(self) -> None:
        """Stop the process where it next asks or hears of the log. Its deliveries still reach it."""
        if self._thawed.is_set():
            self._thawed = anyio.Event()

    def thaw(self) -> None:
        self._thawed.set()

    def kill(self) -> None:
        """The process has ended: whatever of it still runs here sends and hears nothing."""
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
        if anyio.current_time() < self.up_at:
            await anyio.sleep_until(self.up_at)
            await self.running()


class Answerer:
    """Who answers a subject's questions: one at a time, and none while its process is frozen."""

    def __init__(self, connection: Connection, handler: Handler) -> None:
        self.connection = connection
        self._handler = handler
        self._one_at_a_time = anyio.Lock()

    async def answer(self, data: bytes, answered: list[bytes], first: anyio.Event) -> None:
        """Go on when who asked has given up, as a process does that does not know."""
        with suppress(OutcomeUnknown):
            async with self._one_at_a_time:
                await self.connection.running()
                answer = await self._handler(data)
                await self.connection.running()
            answered.append(answer)
            first.set()


class Stream:
    """One stream's messages from sequence `first` on. `changed` is set, and replaced, at each change."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.first = 1
        self.messages: list[Stored] = []
        self.last: dict[str, int] = {}
        self.size = 0
        self.bytes_max = 1 << 62
        self.consumers: dict[str, Consumer] = {}
        self.changed = anyio.Event()

    def add(self, subject: str, data: bytes, now_ns: int) -> int:
        sequence = self.last_sequence + 1
        self.messages.append(Stored(subject, sequence, now_ns, data))
        self.last[subject] = sequence
        self.size += size_bytes(subject, data)
        self.changed_now()
        return sequence

    @property
    def last_sequence(self) -> int:
        return self.first + len(self.messages) - 1

    def at(self, sequence: int) -> Stored:
        return self.messages[sequence - self.first]

    def behind(self, sequence: int) -> list[Stored]:
        return self.messages[max(0, sequence + 1 - self.first) :]

    def trim(self, up_to: int) -> None:
        many = max(0, up_to + 1 - self.first)
        self.size -= sum(size_bytes(stored.subject, stored.data) for stored in self.messages[:many])
        self.first = max(self.first, min(up_to, self.last_sequence) + 1)
        del self.messages[:many]
        self.last = {subject: last for subject, last in self.last.items() if last >= self.first}
        for consumer in self.consumers.values():
            consumer.trimmed(self.first)

    def erase(self, sequence: int) -> None:
        """What is left in its place is of no subject, and says nothing."""
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

    def changed_now(self) -> None:
        changed = self.changed
        self.changed = anyio.Event()
        changed.set()


def size_bytes(subject: str, data: bytes) -> int:
    return MESSAGE_BYTES + len(subject) + len(data)


class Filter:
    """Which subjects are read; each subject is looked at once. Raises LogError."""

    def __init__(self, subjects: Sequence[str]) -> None:
        self._wanted = [subject.split(".") for subject in subjects]
        for one, other in permutations(self._wanted, 2):
            if _matches(one, other):
                raise LogError(f"subjects overlap: {subjects}")
        self._known: dict[str, bool] = {}

    def __call__(self, subject: str) -> bool:
        if (known := self._known.get(subject)) is None:
            tokens = subject.split(".")
            known = self._known[subject] = any(_matches(wanted, tokens) for wanted in self._wanted)
        return known


def _matches(wanted: Sequence[str], tokens: Sequence[str]) -> bool:
    for at, want in enumerate(wanted):
        if want == ">":
            return len(tokens) > at
        if at == len(tokens) or want not in ("*", tokens[at]):
            return False
    return len(wanted) == len(tokens)


class Consumer:
    """The broker's side of a queue: what was delivered, until when it may stay unanswered."""

    def __init__(self, stream: Stream, subject: str) -> None:
        self._stream = stream
        self._filter = Filter([subject])
        self._next = 1
        self._due: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._given_back: list[int] = []
        self._acked: list[int] = []

    def take(self, now: float) -> tuple[Stored, int] | None:
        """Return the next delivery and its count: what is due again, then what is new."""
        again = self._given_back or [sequence for sequence, due in self._due.items() if due <= now]
        if again:
            sequence = again[0]
            if self._given_back:
                self._given_back.remove(sequence)
            self._due.pop(sequence, None)
            return self._deliver(sequence, now)
        while self._next <= self._stream.last_sequence:
            sequence = self._next
            self._next += 1
            if self._filter(self._stream.at(sequence).subject):
                return self._deliver(sequence, now)
        return None

    def _deliver(self, sequence: int, now: float) -> tuple[Stored, int]:
        self._due[sequence] = now + ACK_WAIT_S
        count = self._counts[sequence] = self._counts.get(sequence, 0) + 1
        return self._stream.at(sequence), count

    @property
    def unanswered(self) -> list[int]:
        """The messages that were delivered, or given back, and wait for an acknowledgement."""
        return sorted({*self._due, *self._given_back})

    def answer(self, sequence: int, word: str, now: float, *, delay_s: float = 0.0) -> None:
        """Any delivery of a message may be answered, also an older one."""
        if sequence not in self._due:
            return
        if word == "in progress":
            self._due[sequence] = now + ACK_WAIT_S
            return
        if word == "give back" and delay_s:
            self._due[sequence] = now + delay_s
            return
        del self._due[sequence]
        if word == "ack":
            self._acked.append(sequence)
        else:
            self._given_back.append(sequence)
            self._stream.changed_now()

    def deliver_again(self, sequence: int) -> None:
        """Forget that a message was acknowledged."""
        if sequence in self._acked:
            self._acked.remove(sequence)
            self._counts.pop(sequence, None)
            self._given_back.append(sequence)

    def trimmed(self, first: int) -> None:
        """What was before `first` is gone, whether it was answered or not."""
        self._next = max(self._next, first)
        self._due = {sequence: due for sequence, due in self._due.items() if sequence >= first}
        self._given_back = [sequence for sequence in self._given_back if sequence >= first]
        self._acked = [sequence for sequence in self._acked if sequence >= first]

    def restart(self, happens: Callable[[float], bool]) -> None:
        """Counts start again; what was delivered comes again, some of it although acknowledged."""
        forgotten = [sequence for sequence in self._acked if happens(FORGOTTEN)]
        self._given_back += [sequence for sequence in self._due if sequence not in self._given_back]
        self._due.clear()
        self._counts.clear()
        for sequence in forgotten:
            self.deliver_again(sequence)
