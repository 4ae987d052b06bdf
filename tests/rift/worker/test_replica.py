"""A replica's events on a log that stores nothing for a while."""

import anyio

from events import codec, subjects
from events.memory import MemoryBroker, MemoryLog
from events.schema import ReplicaReady, ReplicaStarting
from rift.engines.sim import SimEngine
from rift.worker.replica import ReplicaAnnouncer
from tests.simulation import clock
from tests.simulation.processes import MODEL, MODELS


def test_a_replica_that_becomes_ready_during_an_outage_keeps_its_engine() -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            broker = MemoryBroker(tasks, lambda: 0)
            starting = ReplicaStarting(replica="r", model=MODEL, engine="sim")
            broker.is_unwritable = True
            tasks.start_soon(ReplicaAnnouncer(MemoryLog(broker), starting).ready, SimEngine(MODELS[MODEL]))
            await anyio.sleep(600.0)
            assert not broker.stream(subjects.FLEET).messages
            broker.is_unwritable = False
            await anyio.sleep(5.0)
            (stored,) = broker.stream(subjects.FLEET).messages
            (event,) = codec.decode(stored.data)[1]
            assert isinstance(event, ReplicaReady)
            tasks.cancel_scope.cancel()

    clock.run(main)
