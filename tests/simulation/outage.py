"""The simulated service with three shards, one of which is out of service for a while. All else works."""

from collections.abc import Callable

import anyio
from anyio.abc import TaskGroup

from events import subjects
from events.memory import Faults
from events.memory.broker import Stream
from tests.simulation import clock
from tests.simulation.ledger import Entry
from tests.simulation.promise import hold
from tests.simulation.service import END_S, SEVERAL_FROM_START, Service

FROM_S, LASTS_S = 8.0, 40.0
BROKEN = subjects.shard_stream(1)
Break = Callable[[Stream, bool], None]

# A request takes 13 s at most; it may wait for a slot that an attempt of the broken shard gives up after 5 s.
ENDED_S = 30.0


class Outage(Service):
    """`restarts`: every process is killed once during the outage."""

    def __init__(self, tasks: TaskGroup, faults: Faults, set_broken: Break, *, restarts: bool) -> None:
        super().__init__(SEVERAL_FROM_START, tasks, faults, mishaps=True)
        self._set_broken, self._restarts = set_broken, restarts
        self._times_ns = (0, 0)

    async def _inject_faults(self) -> None:
        stream = self.broker.stream(BROKEN)
        await anyio.sleep(FROM_S)
        from_ns = self._now_ns()
        self._set_broken(stream, True)
        if self._restarts:
            for process in list(self._supervisor.processes):
                process.kill()
        await anyio.sleep(LASTS_S)
        self._set_broken(stream, False)
        self._times_ns = from_ns, self._now_ns()

    def _check(self) -> None:
        super()._check()
        if not self._restarts:
            started = self._supervisor.started
            hold(started == len(self._supervisor.processes), "a process ended because a shard was broken")
        for entry in self.meanwhile:
            took_s = (entry.ended_at_ns - entry.accepted_at_ns) / 1e9
            hold(took_s < ENDED_S, f"{entry.id} of another shard took {took_s:.0f} s")

    @property
    def meanwhile(self) -> list[Entry]:
        """The requests of other shards that were accepted during the outage."""
        from_ns, until_ns = self._times_ns
        return [
            entry
            for entry in self.ledger.entries.values()
            if from_ns < entry.accepted_at_ns < until_ns and not entry.id.startswith("req_1_")
        ]


def run(set_broken: Break, *, restarts: bool) -> Outage:
    """Raises Violation."""

    async def main() -> Outage:
        async with anyio.create_task_group() as tasks:
            service = Outage(tasks, Faults(append_s=0.01), set_broken, restarts=restarts)
            await service.run()
            tasks.cancel_scope.cancel()
        return service

    return clock.run(main, until_s=END_S)
