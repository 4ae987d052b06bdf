"""A job whose request is trimmed while the worker reads its history: it has ended, so it is acknowledged."""

from typing import Any

import anyio
import pytest

from events import codec, ids, subjects
from events.memory import MemoryBroker, MemoryLog
from events.schema import Parameters, RequestAccepted
from rift.catalogue import Profile
from rift.engines.sim import SimEngine
from rift.worker.shutdown import Shutdown
from rift.worker.slots import Slots
from rift.worker.worker import WorkerConfig, open_worker
from tests.simulation.processes import MODEL, MODELS

pytestmark = pytest.mark.anyio

AT = subjects.Address(0, "lane1234", "model-a")


class Trimmed(MemoryLog):
    """Trimmed as soon as the last sequence of a subject is read."""

    acked = 0

    async def last_sequence(self, stream: str, subject: str | None = None) -> int:
        if subject is not None:
            await self.trim(stream, 1)
        return await super().last_sequence(stream, subject)

    async def ack(self, ack: str) -> None:
        self.acked += 1


async def test_a_trimmed_request_is_not_attempted() -> None:
    request = ids.new_request_id(
        secret=b"s" * 32, account="dev", at=AT, floor=0, entropy=bytes(ids.RANDOM_BYTES)
    )
    accepted = RequestAccepted(
        request=request,
        account="dev",
        key="k",
        model=MODEL,
        kind="inference",
        input="x",
        parameters=Parameters(),
        stream=True,
        prompt_tokens_max=1,
        deadline_ms=1000,
        price_version=1,
    )
    async with anyio.create_task_group() as tasks:
        broker = MemoryBroker(tasks, lambda: 1)
        stream = broker.stream("RIFT_0")
        stream.add(subjects.request(AT), codec.encode("w", [accepted]), 1)
        log: Any = Trimmed(broker)
        engine = SimEngine(MODELS[MODEL], Profile())
        shutdown = Shutdown()
        slots = Slots(1, shutdown)
        config = WorkerConfig(name="w", model="model-a", shard=0, slots=slots, entropy=bytes)

        async def serve() -> None:
            async with open_worker(log, engine, config) as worker:
                await worker.run()

        tasks.start_soon(serve)
        with anyio.fail_after(5):
            while not log.acked:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        assert stream.last_sequence == 1, "no attempt was started"
        shutdown.drain(0.0)
