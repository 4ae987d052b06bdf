"""Live readers and deliveries of a connection in memory."""

from collections.abc import Sequence

import anyio
import anyio.lowlevel

from events.clock import now_s
from events.log import Job, Stored
from events.memory.broker import Connection, Consumer, Filter, MemoryBroker, Stream

# Look at an empty queue this often, to notice jobs that are due again.
PULL_S = 0.5


class MemoryFollower:
    def __init__(
        self,
        connection: Connection,
        broker: MemoryBroker,
        stream: Stream,
        subjects: Sequence[str],
        after: int,
        *,
        pace_s: float = 0.0,
    ) -> None:
        self.position = self._read_to = after
        self._pace_s = pace_s
        self._next_at_s = 0.0
        self._hurry = anyio.Event()
        self._connection = connection
        self._broker = broker
        self._stream = stream
        self._filter = Filter(subjects)

    def hurry(self) -> None:
        self._hurry.set()

    def __aiter__(self) -> "MemoryFollower":
        return self

    async def __anext__(self) -> Sequence[Stored]:
        faults = self._broker.faults
        await anyio.lowlevel.checkpoint()
        if self._pace_s:
            with anyio.move_on_at(self._next_at_s):
                await self._hurry.wait()
            self._hurry = anyio.Event()
        while True:
            await self._connection.running()
            changed = self._stream.changed.pending
            if self._stream.last_sequence > self._read_to and not self._stream.is_silent:
                if self._broker.happens(faults.reader_restarts):
                    await anyio.sleep(self._broker.some(faults.restart_s))
                await anyio.sleep(self._broker.some(faults.reader_s))
                await self._connection.running()
                if batch := self._take():
                    self._next_at_s = now_s() + self._pace_s
                    return batch
            else:
                await changed.wait()

    def _take(self) -> Sequence[Stored]:
        new = self._stream.after(self._read_to)
        self._read_to = self._stream.last_sequence
        batch = [stored for stored in new if self._filter(stored.subject)]
        if batch:
            self.position = batch[-1].sequence
        return batch


class MemoryJobs:
    def __init__(
        self, connection: Connection, broker: MemoryBroker, stream: Stream, consumer: Consumer, ack: str
    ) -> None:
        self._connection = connection
        self._broker = broker
        self._stream = stream
        self._consumer = consumer
        self._ack = ack
        self._slots = 0

    def want(self, slots: int) -> None:
        self._slots = slots
        self._stream.changed.set()

    def __aiter__(self) -> "MemoryJobs":
        return self

    async def __anext__(self) -> Job:
        await anyio.lowlevel.checkpoint()
        while True:
            changed = self._stream.changed.pending
            can_take = self._slots > 0 and self._connection.is_connected and not self._stream.is_silent
            if can_take and (delivery := self._consumer.take(now_s())) is not None:
                return await self._hand_out(*delivery)
            with anyio.move_on_after(PULL_S):
                await changed.wait()

    async def _hand_out(self, stored: Stored, count: int) -> Job:
        self._slots -= 1
        epoch = self._connection.epoch
        await self._connection.thawed()
        reported = 1 if self._broker.happens(self._broker.faults.lying) else count
        return Job(stored, f"{self._ack}.{count}.{stored.sequence}", reported, epoch)
