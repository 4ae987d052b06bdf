"""The requests that a replica may run at once: one pool, whichever shards they come from.

While slots are free, each shard is asked for an equal part of them, at least one. So one busy shard fills the
whole engine in a few round trips, and busy shards get equally many. The jobs of one slot that several shards
send wait in the engine: a replica holds at most one less than the number of shards beyond its slots, and for
a moment as many as its shards were asked for within one pull.
"""

from events.log import Jobs
from rift.worker.counts import WorkerCounts
from rift.worker.isolation import Isolation
from rift.worker.shutdown import Shutdown


class Slots:
    """`isolation` says which of the replica's requests run together, `shutdown` how long it still serves, and
    `counts` what was done."""

    def __init__(self, total: int, shutdown: Shutdown) -> None:
        self.total = total
        self.counts = WorkerCounts()
        self.isolation = Isolation()
        self._free = total
        self.shutdown = shutdown
        self._queues: list[Jobs] = []

    @property
    def used(self) -> int:
        """May exceed `total` for a moment."""
        return self.total - self._free

    def add(self, jobs: Jobs) -> None:
        """Fill the slots from another shard too."""
        self._queues.append(jobs)
        self.ask()

    def take(self) -> None:
        self._free -= 1
        self.ask()

    def give_back(self) -> None:
        self._free += 1
        self.ask()

    def ask(self) -> None:
        """Ask for jobs: none while a suspect waits, or at shutdown."""
        is_paused = self.isolation.is_requested or self.shutdown.is_requested
        free = 0 if is_paused else max(0, self._free)
        for jobs in self._queues:
            jobs.want(-(-free // len(self._queues)))
