"""When the engine sees a prompt: before its start is stored if the request is fresh, and not for longer than
the log may have lost the start."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from events import codec, ids, subjects
from events.log import LogError, OutcomeUnknown, Settled
from events.memory import MemoryBroker, MemoryLog
from events.request_history import HistoryReader
from events.schema import AttemptReleased, AttemptStarted, Parameters, RequestAccepted, TokensGenerated
from rift.catalogue import Pace, Profile
from rift.engines.sim import SimEngine
from rift.worker.shutdown import Shutdown
from rift.worker.slots import Slots
from rift.worker.worker import WorkerConfig, open_worker
from tests.simulation.processes import MODEL, MODELS

pytestmark = pytest.mark.anyio

AT = subjects.Address(0, "lane1234", "model-a")
WORK = subjects.work(AT)


class HeldLog(MemoryLog):
    """Sends an append that has begun only when `store` is called, or fails it."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker)
        self.begun: list[tuple[bytes, Settled]] = []
        self.unsent = False
        self.holds = True

    @property
    def has_unsent(self) -> bool:
        return self.unsent

    def begin_append(self, stream: str, subject: str, data: bytes, settled: Settled) -> bool:
        if not self.holds:
            return super().begin_append(stream, subject, data, settled)
        self.begun.append((data, settled))
        return True

    def store(self) -> None:
        data, settled = self.begun.pop(0)
        settled(self._broker.store("RIFT_0", WORK, data, None))

    def fail(self, error: LogError) -> None:
        """Fail it where a connection is read: outside of any task."""
        asyncio.get_running_loop().call_soon(self.begun.pop(0)[1], error)


class CountingEngine(SimEngine):
    """Counts the prompts that it has seen, and those that it runs."""

    def __init__(self) -> None:
        super().__init__(MODELS[MODEL], Profile(sim=Pace(step_us=20_000)))
        self.seen = self.running = 0

    async def generate(self, *args: Any, **more: Any) -> None:
        self.seen += 1
        self.running += 1
        try:
            await super().generate(*args, **more)
        finally:
            self.running -= 1


class Rig:
    """A worker on a held log. `request` is a fresh request, whose job it has taken."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.log = HeldLog(broker)
        self.engine = CountingEngine()
        self.slots = Slots(1, Shutdown())
        self.stream = broker.stream("RIFT_0")
        text = ids.new_request_id(
            secret=b"s" * 32, account="dev", at=AT, floor=0, entropy=bytes(ids.RANDOM_BYTES)
        )
        self.request = ids.parsed(text)

    def accept(self) -> None:
        accepted = RequestAccepted(
            request=self.request.text,
            account="dev",
            key="k",
            model=MODEL,
            kind="inference",
            input="x",
            parameters=Parameters(max_tokens=4),
            stream=True,
            prompt_tokens_max=8,
            deadline_ms=60_000,
            price_version=1,
        )
        self.stream.add(subjects.request(AT), codec.encode("w", [accepted]), now_ns())

    def stored(self) -> Sequence[Any]:
        return [
            event
            for stored in self.stream.after(0)
            if stored.subject == WORK
            for event in codec.decode(stored.data)[1]
        ]


@asynccontextmanager
async def serving(*, entropy: Callable[[int], bytes]) -> AsyncIterator[Rig]:
    async with anyio.create_task_group() as tasks:
        rig = Rig(MemoryBroker(tasks, now_ns))
        config = WorkerConfig(name="w", model="model-a", shard=0, slots=rig.slots, entropy=entropy)
        async with open_worker(rig.log, rig.engine, config) as worker:
            tasks.start_soon(worker.run)
            rig.accept()
            with anyio.fail_after(10):
                yield rig
            tasks.cancel_scope.cancel()


async def until(holds: Callable[[], object]) -> None:
    with anyio.fail_after(8):
        while not holds():  # noqa: ASYNC110
            await anyio.sleep(0.005)


def now_ns() -> int:
    return int(anyio.current_time() * 1e9)


def entropy() -> Callable[[int], bytes]:
    numbers = iter(range(1, 100))
    return lambda size: bytes([next(numbers)]) * size


async def test_a_fresh_prompt_enters_the_engine_before_its_start_is_stored() -> None:
    async with serving(entropy=entropy()) as rig:
        await until(lambda: rig.log.begun and rig.engine.running)
        await until(lambda: not rig.engine.running)
        assert len(rig.log.begun) == 1, "nothing of the answer is appended before the acknowledgement"
        rig.log.holds = False
        rig.log.store()
        await until(lambda: len(rig.stored()) > 1)
        start, *rest = rig.stored()
        assert isinstance(start, AttemptStarted)
        assert isinstance(rest[0], TokensGenerated)


async def test_tokens_count_once_while_an_attempt_runs_and_after_its_end() -> None:
    async with serving(entropy=entropy()) as rig:
        counts = rig.slots.counts
        await until(lambda: counts.output_tokens)
        assert (counts.claims, counts.repeated, counts.prompt_tokens) == (1, 0, 1)
        rig.log.holds = False
        rig.log.store()
        await until(lambda: rig.slots.used == 0)
        assert (counts.output_tokens, counts.ended) == (4, {"length": 1})


async def test_a_prompt_waits_while_bytes_of_its_start_may_be_in_this_process() -> None:
    async with serving(entropy=entropy()) as rig:
        rig.log.unsent = True
        await until(lambda: rig.log.begun)
        await anyio.sleep(0.05)
        assert not rig.engine.seen
        rig.log.holds = False
        rig.log.store()
        await until(lambda: rig.engine.seen)


async def test_a_start_that_may_be_lost_takes_its_prompt_out_of_the_engine() -> None:
    async with serving(entropy=entropy()) as rig:
        await until(lambda: rig.log.begun and rig.engine.running)
        # Two of four steps.
        await anyio.sleep(0.05)
        rig.log.fail(OutcomeUnknown("the connection was lost"))
        rig.log.holds = False
        history = HistoryReader(rig.log)
        while (past := await history.read(rig.request)).life.phase != "ended":  # noqa: ASYNC110
            await anyio.sleep(0.01)
        assert past.life.reason == "length"
        assert past.life.deaths == 0
        assert rig.engine.seen == 2
        kinds = [type(event) for event in rig.stored()]
        assert kinds[:3] == [AttemptStarted, AttemptReleased, AttemptStarted]


async def test_the_prompt_of_a_repeated_job_waits_until_its_start_is_stored() -> None:
    async with serving(entropy=entropy()) as rig:
        await until(lambda: rig.log.begun and rig.engine.running)
        rig.log.fail(OutcomeUnknown("the connection was lost"))
        await until(lambda: rig.log.begun)
        # The release of the first attempt.
        rig.log.store()
        await until(lambda: rig.log.begun)
        await anyio.sleep(0.05)
        assert (rig.engine.seen, rig.engine.running) == (1, 0)
        rig.log.store()
        await until(lambda: rig.engine.seen == 2)
