"""Workers as processes on this machine.

Each worker is a supervised child, restarted with growing pauses, and a new replica at each start. If there
are too many, the youngest one that is not ready is stopped first and at once; after those, the least busy one
is retired, which lets it finish its requests.
"""

import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import anyio
from anyio.abc import TaskGroup

from events import fleet, subjects
from events.contracts import SECOND_NS
from events.errors import reason
from events.fleet import Fleet
from events.log import Log, LogError, Stored
from events.publisher import Publisher
from events.schema import ReplicaLost, ReplicaReady, ReplicaReported, ReplicaStopped
from events.wakeup import Wakeup
from rift.supervisor import Child, Parent, is_killed, words

logger = logging.getLogger(__name__)

WRITER = "fleet"

# Long enough for a broker to restart. If the event is not stored by then, the replica's silence has the same
# effect.
APPEND_S = 30.0

# The pause before an unreadable log is read again.
READ_RETRY_S = 1.0

# Clients that wait for the model see this much of the last line of a failed worker's log.
WHY_CHARACTERS = 300

# How long a worker may take to stop: to release its answers and to end its engine.
WORKER_STOP_S = 4.6


class Host(NamedTuple):
    """This machine. `command` returns the command line of a replica, from model and replica id, and
    `environment` its variables, from model and place. Places are numbered from 0; the lowest free one is
    used."""

    serves: frozenset[str]
    command: Callable[[str, str], Sequence[str]]
    environment: Callable[[str, int], Mapping[str, str]]
    parent: Parent


class LocalFleet:
    """Implements `rift.fleet.Driver`."""

    def __init__(self, log: Log, host: Host) -> None:
        self._log = log
        self._publisher = Publisher(log, WRITER)
        self._host = host
        self._fleet = Fleet()
        self._wanted: dict[str, int] = {}
        self._workers: list[_Worker] = []
        self._changed = Wakeup()

    @property
    def children(self) -> list[Child]:
        return [worker.child for worker in self._workers]

    def want(self, model: str, replicas: int) -> None:
        if model in self._host.serves:
            self._wanted[model] = replicas
        self._changed.set()

    def lost(self, model: str, replica: str, why: str) -> None:
        for worker in self._workers:
            if worker.replica == replica and worker.child.runs:
                worker.is_declared_lost = True
                worker.child.kill(why)

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._follow_fleet)
            while True:
                for model, wanted in self._wanted.items():
                    self._scale(tasks, model, wanted)
                await self._changed.wait()

    def _scale(self, tasks: TaskGroup, model: str, wanted: int) -> None:
        staying = [worker for worker in self._workers if worker.model == model and not worker.is_leaving]
        for _ in range(wanted - len(staying)):
            self._start(tasks, model)
        for worker in sorted(staying, key=_stop_order)[: max(0, len(staying) - wanted)]:
            worker.is_leaving = True
            if worker.is_ready:
                worker.child.retire()
            else:
                tasks.start_soon(self._end_unneeded, worker)

    def _start(self, tasks: TaskGroup, model: str) -> None:
        place = next(number for number in range(len(self._workers) + 1) if number not in self._places())
        worker = _Worker(model, place, self._host, self._publish)
        try:
            worker.child.start()
        except OSError as error:
            # The supervisor retries.
            self._host.parent.notify(f"{worker.child.name} cannot be started: {reason(error)}")
        self._workers.append(worker)
        tasks.start_soon(self._keep, worker)

    def _places(self) -> set[int]:
        return {worker.place for worker in self._workers}

    async def _keep(self, worker: "_Worker") -> None:
        await worker.child.supervise()
        self._workers.remove(worker)

    async def _end_unneeded(self, worker: "_Worker") -> None:
        replica = worker.replica
        runs = worker.child.runs
        await worker.child.stop(WORKER_STOP_S)
        if runs:
            stopped = ReplicaStopped(
                replica=replica, model=worker.model, why="not needed", lived_ns=worker.lived_ns()
            )
            await self._publish(stopped)

    async def _publish(self, event: ReplicaLost | ReplicaStopped) -> None:
        try:
            await self._publisher.publish(event, within_s=APPEND_S)
        except LogError as error:
            self._host.parent.notify(f"the end of {event.replica} could not be stored: {error}")

    async def _follow_fleet(self) -> None:
        """Note which workers are ready, and how busy they are."""
        after: int | None = None
        while True:
            try:
                if after is None:
                    after = await self._log.last_sequence(subjects.FLEET)
                async with self._log.follow(subjects.FLEET, ["rift.fleet.>"], after=after) as reader:
                    async for batch in reader:
                        for stored in batch:
                            self._note_reports(stored)
                            after = stored.sequence
            except LogError as error:
                logger.warning("the fleet cannot be read: %s", error)
                await anyio.sleep(READ_RETRY_S)

    def _note_reports(self, stored: Stored) -> None:
        for event in self._fleet.fold(stored):
            if isinstance(event, ReplicaReady | ReplicaReported):
                for worker in self._workers:
                    if worker.replica == event.replica:
                        worker.is_ready |= isinstance(event, ReplicaReady)
                        worker.running = getattr(event, "running", 0)


class _Worker:
    """One place: a child that is a new replica at each start."""

    def __init__(
        self, model: str, place: int, host: Host, publish: Callable[[ReplicaLost], Awaitable[None]]
    ) -> None:
        self.model = model
        self.place = place
        self.replica = ""
        self.is_ready = False
        self.is_leaving = False
        # The leader or the replica itself declared it lost, so its end needs no event.
        self.is_declared_lost = False
        self.running = 0
        self.began_at_s = 0.0
        self._host = host
        self._publish = publish
        self.child = Child(
            f"worker-{place}",
            self._command,
            host.parent,
            environment=host.environment(model, place),
            ended=self._ended,
        )

    def lived_ns(self) -> int:
        return int((anyio.current_time() - self.began_at_s) * SECOND_NS)

    def _command(self) -> Sequence[str]:
        self.replica = f"{subjects.slug(self.model)}-{secrets.token_hex(4)}"
        self.is_ready = False
        self.running = 0
        self.began_at_s = anyio.current_time()
        return self._host.command(self.model, self.replica)

    async def _ended(self, status: int) -> None:
        """Publish that the replica is lost, unless it stopped itself or the leader declared it lost."""
        was_declared_lost = self.is_declared_lost
        self.is_declared_lost = False
        if status == 0 or was_declared_lost:
            return
        by_host = is_killed(status)
        why = words(status) if by_host else self.child.last_line()[:WHY_CHARACTERS]
        # A replica that is killed while it starts needs more than this host has, and will again: the model
        # does not start here.
        cause: Literal["host", "engine"] = "host" if by_host and self.is_ready else "engine"
        await self._publish(ReplicaLost(replica=self.replica, model=self.model, why=why, cause=cause))


def _stop_order(worker: _Worker) -> tuple[bool, int, float]:
    return worker.is_ready, worker.running, -worker.began_at_s


async def declare_lost(log: Log) -> None:
    """Declare every replica lost that the fleet's stream still counts: none has been started yet."""
    held = await fleet.read(log)
    publisher = Publisher(log, WRITER)
    for model, replicas in held.replicas.items():
        for replica in replicas:
            lost = ReplicaLost(replica=replica, model=model, why="found dead at the start", cause="host")
            await publisher.publish(lost, within_s=APPEND_S)
