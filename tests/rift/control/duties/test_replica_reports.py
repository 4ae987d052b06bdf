"""Which replicas are silent: not those that could not report."""

import anyio

from events import codec, subjects
from events.contracts import REPLICA_LOST_S
from events.fleet import Fleet
from events.log import Stored
from events.memory import MemoryBroker, MemoryLog
from events.schema import ReplicaStarting
from rift.control.duties.replica_reports import ReplicaReports
from tests.simulation import clock


def test_an_outage_of_the_log_is_no_silence_of_a_replica() -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            reports = ReplicaReports(MemoryLog(MemoryBroker(tasks, lambda: 0)), Fleet())
            data = codec.encode("r", [ReplicaStarting(replica="r", model="m", engine="sim")])
            reports.fold(Stored(subjects.fleet("m"), 1, 1, data))
            assert reports.silent() == []
            await anyio.sleep(REPLICA_LOST_S - 1)
            assert reports.silent() == []
            reports.note_outage()
            assert reports.silent() == []
            await anyio.sleep(REPLICA_LOST_S - 1)
            assert reports.silent() == []
            await anyio.sleep(2.0)
            assert reports.silent() == [("m", "r", int(REPLICA_LOST_S + 1))]

    clock.run(main)
