"""A process's connection to the streams in memory."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel

from events import subjects as names
from events.append_health import AppendHealth
from events.clock import now_s
from events.contracts import MESSAGE_BYTES_MAX
from events.log import (
    API_TIMEOUT_S,
    APPEND_TIMEOUT_S,
    SCAN_TIMEOUT_S,
    ForeignDelivery,
    Log,
    LogError,
    NoResponders,
    OutcomeUnknown,
    RecordTooLarge,
    Settled,
    Stored,
)
from events.memory.broker import Answerer, Consumer, Filter, Handler, MemoryBroker, Stream
from events.memory.readers import MemoryFollower, MemoryJobs

# Two messages of one connection arrive in order, even if nothing takes time.
APART_S = 1e-6


# The share of messages under way that a lost connection loses; the others have arrived.
LOST_WITH_CONNECTION = 0.5


def connect(broker: MemoryBroker) -> Log:
    """Return a new connection; `MemoryLog.connection` injects its faults."""
    return MemoryLog(broker)


class MemoryLog:
    """One process's log. `connection` can be cut, frozen and closed."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.connection = broker.connect()
        self._broker = broker
        self._health = AppendHealth()
        self._arrives_at_s = 0.0

    @property
    def epoch(self) -> int:
        return self.connection.epoch

    @property
    def reader_gaps(self) -> int:
        return 0

    @property
    def is_connected(self) -> bool:
        return self.connection.is_connected

    async def close(self) -> None:
        self.connection.is_closed = True

    # --- appends -------------------------------------------------------------------------------------

    async def append(self, stream: str, subject: str, data: bytes, *, expect_last: int | None = None) -> int:
        with self._health.measured(stream):
            return await self._append(stream, subject, data, expect_last)

    def begin_append(self, stream: str, subject: str, data: bytes, settled: Settled) -> bool:
        if not self.connection.is_connected:
            return False

        async def run() -> None:
            try:
                outcome: int | LogError = await self.append(stream, subject, data)
            except LogError as error:
                outcome = error
            settled(outcome)

        self._broker.tasks.start_soon(run)
        return True

    @property
    def has_unsent(self) -> bool:
        return not self.connection.is_connected

    def unwritable_s(self, stream: str) -> float:
        return self._health.unwritable_s(stream)

    def time_appends(self, took: Callable[[int], None]) -> None:
        self._health.took = took

    async def _append(self, stream: str, subject: str, data: bytes, expect_last: int | None) -> int:
        await self.connection.thawed()
        if len(data) > MESSAGE_BYTES_MAX:
            raise RecordTooLarge(f"a record of {len(data)} bytes is larger than the broker's limit")
        answer: list[int | LogError] = []
        answered = anyio.Event()

        def arrive() -> None:
            try:
                answer.append(self._broker.store(stream, subject, data, expect_last))
            except LogError as error:
                answer.append(error)

        epoch = self.epoch
        due_at_s = self._due_at_s()
        self._broker.tasks.start_soon(self._travel, stream, epoch, due_at_s, arrive, answered)
        with anyio.move_on_after(APPEND_TIMEOUT_S):
            await answered.wait()
        await self.connection.thawed()
        if not answered.is_set():
            raise OutcomeUnknown(f"append to {stream}: no answer")
        if isinstance(answer[0], LogError):
            raise answer[0]
        return answer[0]

    def _due_at_s(self) -> float:
        """Return when a message that is sent now arrives: after all earlier ones."""
        sent_at_s = max(now_s(), self.connection.up_at_s)
        self._arrives_at_s = max(
            sent_at_s + self._broker.some(self._broker.faults.append_s), self._arrives_at_s + APART_S
        )
        return self._arrives_at_s

    async def _travel(
        self, stream: str, epoch: int, due_at_s: float, arrive: Callable[[], None], answered: anyio.Event
    ) -> None:
        """Carry one message to the broker and its answer back, even if the sender no longer waits."""
        broker = self._broker
        faults = self._broker.faults
        connection = self.connection
        if broker.happens(faults.disconnects):
            connection.disconnect(broker.some(faults.down_s))
        await anyio.sleep_until(due_at_s)
        target = broker.streams.get(stream)
        if broker.is_unwritable or (target is not None and (target.is_unwritable or target.is_silent)):
            return
        cut = epoch != connection.epoch
        if (cut and broker.happens(LOST_WITH_CONNECTION)) or broker.happens(faults.lost):
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

    async def streams(self) -> set[str]:
        await self.connection.thawed()
        return set(self._broker.streams)

    async def last_sequence(self, stream: str, subject: str | None = None) -> int:
        found = await self._ask(stream)
        return found.last_sequence if subject is None else found.last.get(subject, 0)

    async def last(self, stream: str, subject: str) -> Stored | None:
        found = await self._ask(stream)
        matches = Filter([subject])
        sequence = max((last for name, last in found.last.items() if matches(name)), default=0)
        return found.at(sequence) if sequence else None

    async def first_sequence(self, stream: str) -> int:
        return (await self._ask(stream)).first

    async def trim(self, stream: str, up_to: int) -> None:
        (await self._ask(stream)).trim(up_to)

    async def get(self, stream: str, sequence: int) -> Stored | None:
        found = await self._ask(stream)
        is_held = found.first <= sequence <= found.last_sequence
        return found.at(sequence) if is_held and found.at(sequence).subject else None

    async def erase(self, stream: str, sequence: int) -> None:
        (await self._ask(stream)).erase(sequence)

    async def room_bytes(self, stream: str) -> int:
        found = await self._ask(stream)
        return 0 if self._broker.is_full or found.is_full else found.bytes_max - found.size

    async def capacity_bytes(self, stream: str) -> int:
        return (await self._ask(stream)).bytes_max

    async def stream_servers(self, stream: str) -> Mapping[str, str]:
        await self._ask(stream)
        return {}

    async def _ask(self, stream: str) -> Stream:
        """Return a stream once a request has reached its leader. Raises LogError."""
        with anyio.move_on_after(API_TIMEOUT_S):
            await self.connection.running()
            await anyio.sleep(self._broker.some(self._broker.faults.append_s))
            await self.connection.running()
            return await self._answering(stream)
        raise OutcomeUnknown(f"no answer from {stream}")

    async def _answering(self, stream: str) -> Stream:
        """Return a stream once it answers. Raises LogError."""
        source = self._broker.stream(stream)
        with anyio.move_on_after(API_TIMEOUT_S):
            await source.answering()
            return source
        raise OutcomeUnknown(f"no answer from {stream}")

    @asynccontextmanager
    async def follow(
        self, stream: str, subjects: Sequence[str], *, after: int, pace_s: float = 0.0
    ) -> AsyncIterator["MemoryFollower"]:
        await self.connection.running()
        source = await self._answering(stream)
        yield MemoryFollower(self.connection, self._broker, source, subjects, after, pace_s=pace_s)

    async def scan(
        self, stream: str, subjects: Sequence[str], *, first: int, target: int
    ) -> AsyncGenerator[Sequence[Stored], None]:
        if target < max(first, 1):
            return
        deadline = now_s() + SCAN_TIMEOUT_S
        source = self._broker.stream(stream)
        reader = MemoryFollower(self.connection, self._broker, source, subjects, max(first, 1) - 1)
        while reader.position < target and source.first <= target:
            batch: Sequence[Stored] = ()
            with anyio.move_on_at(deadline):
                batch = await anext(reader)
            if not batch:
                raise LogError(f"{stream}: sequence {target} was not read within {SCAN_TIMEOUT_S:g} s")
            yield [stored for stored in batch if stored.sequence <= target]

    # --- deliveries ----------------------------------------------------------------------------------

    @asynccontextmanager
    async def jobs(self, shard: int, model: str) -> AsyncIterator["MemoryJobs"]:
        await self.connection.running()
        stream = names.shard_stream(shard)
        name = f"worker-{model}"
        source = await self._answering(stream)
        consumer = source.consumers.setdefault(name, Consumer(source, names.queue(shard, model)))
        yield MemoryJobs(self.connection, self._broker, source, consumer, f"ack.{stream}.{name}")

    async def ack(self, ack: str) -> None:
        await self._answer(ack, "ack")

    async def in_progress(self, ack: str) -> None:
        await self._answer(ack, "in progress")

    async def give_back(self, ack: str, *, delay_s: float = 0.0, of: names.Address | None = None) -> None:
        if of is not None and not ack.startswith(f"ack.{names.shard_stream(of.shard)}.worker-{of.model}."):
            raise ForeignDelivery(f"{ack!a} is no delivery of {of.model} in shard {of.shard}")
        await self._answer(ack, "give back", delay_s)

    async def _answer(self, ack: str, word: str, delay_s: float = 0.0) -> None:
        """Send an answer without confirmation."""
        await self.connection.thawed()
        await anyio.lowlevel.checkpoint()
        _, stream, name, _, sequence = ack.split(".")
        consumer = self._broker.stream(stream).consumers[name]
        is_heard = self.is_connected and not self._broker.stream(stream).is_silent
        if is_heard and not self._broker.happens(self._broker.faults.lost_answers):
            consumer.answer(int(sequence), word, now_s(), delay_s=delay_s)
            if word == "ack" and self._broker.happens(self._broker.faults.again):
                consumer.deliver_again(int(sequence))

    # --- request-reply -----------------------------------------------------------------------------------

    async def ask(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        answered: list[bytes] = []
        first = anyio.Event()
        with anyio.move_on_after(timeout_s):
            await self.connection.running()
            answerers = self._broker.answers.get(subject, ())
            connected = [answerer for answerer in answerers if answerer.connection.is_connected]
            if not connected:
                raise NoResponders(f"no process answers {subject}")
            for answerer in connected:
                self._broker.tasks.start_soon(answerer.answer, data, answered, first)
            await first.wait()
            await self.connection.running()
            return answered[0]
        raise LogError(f"no answer on {subject} within {timeout_s:g} s")

    @asynccontextmanager
    async def answer(
        self, subject: str, handler: Handler, *, concurrent: bool = False
    ) -> AsyncIterator[None]:
        answerer = Answerer(self.connection, handler, concurrent=concurrent)
        answerers = self._broker.answers.setdefault(subject, [])
        answerers.append(answerer)
        try:
            yield
        finally:
            answerers.remove(answerer)
            if not answerers:
                del self._broker.answers[subject]
