"""A process's connection to the streams in memory."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel

from events import subjects as names
from events.contracts import MESSAGE_BYTES_MAX
from events.log import Log, LogError, NoResponders, OutcomeUnknown, RecordTooLarge, Stored
from events.memory.broker import Answerer, Consumer, Filter, Handler, MemoryBroker, Stream
from events.memory.readers import MemoryFollower, MemoryJobs

# As the real client has them.
APPEND_TIMEOUT_S = 2.0
API_TIMEOUT_S = 5.0
SCAN_TIMEOUT_S = 30.0

# Two messages of one connection arrive one after the other, even where nothing takes time.
APART_S = 1e-6


# The share of messages under way that a cut connection takes with it; the others have arrived.
CUT = 0.5


def connect(broker: MemoryBroker) -> Log:
    """Return a connection of its own: what it suffers is `MemoryLog.connection`'s."""
    return MemoryLog(broker)


class MemoryLog:
    """`connection` is what may be cut, frozen and closed."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.connection = broker.connect()
        self._broker = broker
        self._arrived_at = 0.0

    @property
    def epoch(self) -> int:
        return self.connection.epoch

    @property
    def is_connected(self) -> bool:
        return self.connection.is_connected

    async def close(self) -> None:
        self.connection.is_closed = True

    # --- appends -------------------------------------------------------------------------------------

    async def append(self, stream: str, subject: str, data: bytes, *, expect_last: int | None = None) -> int:
        await self.connection.thawed()
        if len(data) > MESSAGE_BYTES_MAX:
            raise RecordTooLarge(f"a record of {len(data)} bytes is larger than the broker takes")
        answer: list[int | LogError] = []
        answered = anyio.Event()

        def arrive() -> None:
            try:
                answer.append(self._broker.store(stream, subject, data, expect_last))
            except LogError as error:
                answer.append(error)

        epoch = self.epoch
        due_at = self._due_at()
        self._broker.tasks.start_soon(self._travel, epoch, due_at, arrive, answered)
        with anyio.move_on_after(APPEND_TIMEOUT_S):
            await answered.wait()
        await self.connection.thawed()
        if not answered.is_set():
            raise OutcomeUnknown(f"append to {stream}: no answer")
        if isinstance(answer[0], LogError):
            raise answer[0]
        return answer[0]

    def _due_at(self) -> float:
        """Return when a message that is sent now arrives: after all that were sent before."""
        sent_at = max(anyio.current_time(), self.connection.up_at)
        self._arrived_at = max(
            sent_at + self._broker.some(self._broker.faults.append_s), self._arrived_at + APART_S
        )
        return self._arrived_at

    async def _travel(
        self, epoch: int, due_at: float, arrive: Callable[[], None], answered: anyio.Event
    ) -> None:
        """Take one message to the broker, and its answer back. It goes on when its sender has given up."""
        broker = self._broker
        faults = self._broker.faults
        connection = self.connection
        if broker.happens(faults.disconnects):
            connection.disconnect(broker.some(faults.down_s))
        await anyio.sleep_until(due_at)
        cut = epoch != connection.epoch
        if (cut and broker.happens(CUT)) or broker.happens(faults.lost):
            return
        if broker.happens(faults.late):
            await anyio.sleep(broker.some(faults.late_s))
        arrive()
        if not cut and not broker.happens(faults.unanswered):
            answered.set()
        if broker.happens(faults.doubled):
            await anyio.sleep(broker.some(faults.late_s))
            arrive()

    # --- reads ---------------------------------------------------------------------------------------

    async def last_sequence(self, stream: str, subject: str | None = None) -> int:
        held = await self._ask(stream)
        return held.last_sequence if subject is None else held.last.get(subject, 0)

    async def last(self, stream: str, subject: str) -> Stored | None:
        held = await self._ask(stream)
        wanted = Filter([subject])
        sequence = max((last for name, last in held.last.items() if wanted(name)), default=0)
        return held.at(sequence) if sequence else None

    async def first_sequence(self, stream: str) -> int:
        return (await self._ask(stream)).first

    async def trim(self, stream: str, up_to: int) -> None:
        (await self._ask(stream)).trim(up_to)

    async def get(self, stream: str, sequence: int) -> Stored | None:
        held = await self._ask(stream)
        there = held.first <= sequence <= held.last_sequence
        return held.at(sequence) if there and held.at(sequence).subject else None

    async def erase(self, stream: str, sequence: int) -> None:
        (await self._ask(stream)).erase(sequence)

    async def room_bytes(self, stream: str) -> int:
        held = await self._ask(stream)
        return 0 if self._broker.is_full else held.bytes_max - held.size

    async def capacity_bytes(self, stream: str) -> int:
        return (await self._ask(stream)).bytes_max

    async def _ask(self, stream: str) -> Stream:
        """Return a stream once the question has reached its leader. Raises LogError."""
        with anyio.move_on_after(API_TIMEOUT_S):
            await self.connection.running()
            await anyio.sleep(self._broker.some(self._broker.faults.append_s))
            await self.connection.running()
            return self._broker.stream(stream)
        raise OutcomeUnknown(f"no answer from {stream}")

    @asynccontextmanager
    async def follow(
        self, stream: str, subjects: Sequence[str], *, after: int, pace_s: float = 0.0
    ) -> AsyncIterator["MemoryFollower"]:
        await self.connection.running()
        held = self._broker.stream(stream)
        yield MemoryFollower(self.connection, self._broker, held, subjects, after, pace_s=pace_s)

    async def scan(
        self, stream: str, subjects: Sequence[str], *, first: int, target: int
    ) -> AsyncGenerator[Sequence[Stored], None]:
        if target < max(first, 1):
            return
        deadline = anyio.current_time() + SCAN_TIMEOUT_S
        held = self._broker.stream(stream)
        reader = MemoryFollower(self.connection, self._broker, held, subjects, max(first, 1) - 1)
        while reader.position < target and held.first <= target:
            batch: Sequence[Stored] = ()
            with anyio.move_on_at(deadline):
                batch = await anext(reader)
            if not batch:
                raise LogError(f"{stream}: sequence {target} could not be read in {SCAN_TIMEOUT_S} s")
            yield [stored for stored in batch if stored.sequence <= target]

    # --- deliveries ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def jobs(self, shard: int, model: str) -> AsyncIterator["MemoryJobs"]:
        await self.connection.running()
        stream = names.shard_stream(shard)
        name = f"worker-{model}"
        held = self._broker.stream(stream)
        consumer = held.consumers.setdefault(name, Consumer(held, names.queue(shard, model)))
        yield MemoryJobs(self.connection, self._broker, held, consumer, f"ack.{stream}.{name}")

    async def ack(self, ack: str) -> None:
        await self._answer(ack, "ack")

    async def in_progress(self, ack: str) -> None:
        await self._answer(ack, "in progress")

    async def give_back(self, ack: str, *, delay_s: float = 0.0) -> None:
        await self._answer(ack, "give back", delay_s)

    async def _answer(self, ack: str, word: str, delay_s: float = 0.0) -> None:
        """Send and forget, as it is: nobody says whether it arrived."""
        await self.connection.thawed()
        await anyio.lowlevel.checkpoint()
        _, stream, name, _, sequence = ack.split(".")
        consumer = self._broker.stream(stream).consumers[name]
        if self.is_connected and not self._broker.happens(self._broker.faults.lost_answers):
            consumer.answer(int(sequence), word, anyio.current_time(), delay_s=delay_s)
            if word == "ack" and self._broker.happens(self._broker.faults.again):
                consumer.deliver_again(int(sequence))

    # --- questions -----------------------------------------------------------------------------------

    async def ask(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        answered: list[bytes] = []
        first = anyio.Event()
        with anyio.move_on_after(timeout_s):
            await self.connection.running()
            there = [one for one in self._broker.answers.get(subject, ()) if one.connection.is_connected]
            if not there:
                raise NoResponders(f"nobody answers {subject}")
            for answerer in there:
                self._broker.tasks.start_soon(answerer.answer, data, answered, first)
            await first.wait()
            await self.connection.running()
            return answered[0]
        raise LogError(f"nobody answers {subject} within {timeout_s:g} s")

    @asynccontextmanager
    async def answer(self, subject: str, handler: Handler) -> AsyncIterator[None]:
        answerer = Answerer(self.connection, handler)
        there = self._broker.answers.setdefault(subject, [])
        there.append(answerer)
        try:
            yield
        finally:
            there.remove(answerer)
            if not there:
                del self._broker.answers[subject]
