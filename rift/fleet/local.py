"""Workers as processes of this machine, in the number that was decided for each model.

Each is a child of its own, started again later each time when it ends by itself, and another replica at each
start. Where there are too many, the youngest that is not ready goes first and at once, then the one with the
least to do, once it has finished that.
"""

import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import anyio
from anyio.abc import TaskGroup

from events import codec, subjects
from events.fleet import Fleet
from events.log import Log, LogError, Stored, append_until_known
from events.schema import AnyEvent, ReplicaLost, ReplicaReady, ReplicaReported, ReplicaStopped
from rift.supervisor import Child, Parent, is_killed, words

logger = logging.getLogger(__name__)

WRITER = "fleet"

# A broker's restart is waited out. What is not said by then, the replica's silence says.
SAY_S = 30.0

# A log that cannot be read is tried again this soon.
READ_AGAIN_S = 1.0

# Of a log's last line: it is shown to who waits for the model.
WHY_CHARACTERS = 300


# One that became ready in this moment may have begun with an answer: it has so long to let go of it.
UNNEEDED_S = 1.0


Say = Callable[[str, AnyEvent], Awaitable[None]]


class Host(NamedTuple):
    """This machine, for workers of the models that it serves: `command` says how a replica is started,
    `environment` what it finds in its place. Places are numbered from 0, and the lowest free one is taken."""

    serves: frozenset[str]
    command: Callable[[str, str], Sequence[str]]
    environment: Callable[[str, int], Mapping[str, str]]
    parent: Parent


class LocalFleet:
    """Implements `rift.fleet.Driver`."""

    def __init__(self, log: Log, host: Host) -> None:
        self._log = log
        self._host = host
        self._fleet = Fleet()
        self._wanted: dict[str, int] = {}
        self._workers: list[_Worker] = []
        self._changed = anyio.Event()

    @property
    def children(self) -> list[Child]:
        return [worker.child for worker in self._workers]

    def want(self, model: str, replicas: int) -> None:
        if model in self._host.serves:
            self._wanted[model] = replicas
        self._changed.set()

    def lost(self, model: str, replica: str) -> None:
        for worker in self._workers:
            if worker.replica == replica and worker.child.runs:
                worker.is_given_up = True
                worker.child.kill()

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._listen)
            while True:
                for model, wanted in self._wanted.items():
                    self._bring(tasks, model, wanted)
                await self._changed.wait()
                self._changed = anyio.Event()

    def _bring(self, tasks: TaskGroup, model: str, wanted: int) -> None:
        staying = [worker for worker in self._workers if worker.model == model and not worker.leaves]
        for _ in range(wanted - len(staying)):
            self._start(tasks, model)
        for worker in sorted(staying, key=_goes_first)[: max(0, len(staying) - wanted)]:
            worker.leaves = True
            if worker.is_ready:
                worker.child.retire()
            else:
                tasks.start_soon(self._end_unneeded, worker)

    def _start(self, tasks: TaskGroup, model: str) -> None:
        place = next(number for number in range(len(self._workers) + 1) if number not in self._places())
        worker = _Worker(model, place, self._host, self._say)
        try:
            worker.child.start()
        except OSError as error:
            # Its supervisor tries again.
            self._host.parent.notify(f"{worker.child.name} cannot be started: {error}")
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
        await worker.child.stop(UNNEEDED_S)
        if runs:
            stopped = ReplicaStopped(
                replica=replica, model=worker.model, why="not needed", lived_ns=worker.lived_ns()
            )
            await self._say(worker.model, stopped)

    async def _say(self, model: str, event: AnyEvent) -> None:
        subject = subjects.fleet(subjects.slug(model))
        data = codec.encode(WRITER, [event])
        try:
            await append_until_known(self._log, subjects.FLEET, subject, data, within_s=SAY_S)
        except LogError as error:
            self._host.parent.notify(f"{event} could not be stored: {error}")

    async def _listen(self) -> None:
        """Hear which of ours are ready, and how much they have to do."""
        after: int | None = None
        while True:
            try:
                if after is None:
                    after = await self._log.last_sequence(subjects.FLEET)
                async with self._log.follow(subjects.FLEET, ["rift.fleet.>"], after=after) as reader:
                    async for batch in reader:
                        for stored in batch:
                            self._hear(stored)
                            after = stored.sequence
            except LogError as error:
                logger.warning("the fleet cannot be read: %s", error)
                await anyio.sleep(READ_AGAIN_S)

    def _hear(self, stored: Stored) -> None:
        for event in self._fleet.fold(stored):
            if isinstance(event, ReplicaReady | ReplicaReported):
                for worker in self._workers:
                    if worker.replica == event.replica:
                        worker.is_ready |= isinstance(event, ReplicaReady)
                        worker.running = getattr(event, "running", 0)


class _Worker:
    """One place: a child that is another replica at each start."""

    def __init__(self, model: str, place: int, host: Host, say: Say) -> None:
        self.model = model
        self.place = place
        self.replica = ""
        self.is_ready = self.leaves = self.is_given_up = False
        self.running = 0
        self.began_at = 0.0
        self._host = host
        self._say = say
        self.child = Child(
            f"worker-{place}",
            self._command,
            host.parent,
            environment=host.environment(model, place),
            ended=self._ended,
        )

    def lived_ns(self) -> int:
        return int((anyio.current_time() - self.began_at) * 1e9)

    def _command(self) -> Sequence[str]:
        self.replica = f"{subjects.slug(self.model)}-{secrets.token_hex(4)}"
        self.is_ready = False
        self.running = 0
        self.began_at = anyio.current_time()
        return self._host.command(self.model, self.replica)

    async def _ended(self, status: int) -> None:
        """Say that the replica was lost, unless it said itself that it ends, or the leader gave it up."""
        given_up = self.is_given_up
        self.is_given_up = False
        if status == 0 or given_up:
            return
        by_host = is_killed(status)
        why = words(status) if by_host else self.child.last_line()[:WHY_CHARACTERS]
        # Who is killed while it starts takes more than there is here, and will the next time.
        cause: Literal["host", "engine"] = "host" if by_host and self.is_ready else "engine"
        await self._say(self.model, ReplicaLost(replica=self.replica, model=self.model, why=why, cause=cause))


def _goes_first(worker: _Worker) -> tuple[bool, int, float]:
    return worker.is_ready, worker.running, -worker.began_at
