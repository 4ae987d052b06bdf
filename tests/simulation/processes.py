"""The processes of a simulated service: gateways, workers and the janitor, each with its own connections.

A killed process sends and receives nothing more, but messages that it sent before may still arrive. A frozen
process continues later without noticing the pause. The processes run Rift's own code.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import anyio
from anyio.abc import TaskGroup

from events import codec, ids, shards, subjects
from events.log import LogError, append_until_known
from events.memory import MemoryBroker, MemoryLog
from events.schema import AnyEvent, ReplicaLost, ReplicaStarting, ReplicaStopped
from rift.catalogue import Catalogue, Model, Pace, Profile
from rift.control.duties.janitor import Janitor
from rift.engines import Emit, EngineFailed, Rendered
from rift.engines.sim import SimEngine
from rift.gateway import process as gateway
from rift.gateway.state import GatewayConfig
from rift.worker.process import serve_shards
from rift.worker.replica import ReplicaAnnouncer
from rift.worker.serving import Serving
from rift.worker.shutdown import Shutdown

MODEL = "model-a"
MODELS: Catalogue = {MODEL: Model(source="sim", context_tokens=512, prompt_usd="0.1", output_usd="0.35")}
SECRET = b"simulated" * 4
SLOTS = 3
# With two prompts that have no token yet, a worker leaves further requests to others.
UNFILLED_MAX = 12
PROFILE = Profile(sim=Pace(step_us=50_000, running_max=SLOTS))

# A supervisor reports a worker's end within this time.
NOTICED_S = 1.0
SAY_S = 60.0
RETRY_S = 1.0


class Chance(Protocol):
    """The part of `random.Random` that the processes use."""

    def random(self) -> float: ...
    def uniform(self, a: float, b: float, /) -> float: ...
    def randbytes(self, n: int, /) -> bytes: ...


class Process:
    """`ended` is set once the process no longer runs; `why` is the error that ended it."""

    kind = "process"

    def __init__(self, broker: MemoryBroker, chance: Chance, name: str) -> None:
        self.name, self.chance = name, chance
        self.log, self.second_log = MemoryLog(broker), MemoryLog(broker)
        self.shard = 0
        self.ended = anyio.Event()
        self.is_frozen = False
        self.why: BaseException | None = None
        self._scope = anyio.CancelScope()

    async def run(self) -> None:
        try:
            with self._scope:
                await self.main()
        except* (EngineFailed, LogError) as failed:
            self.why = failed
        finally:
            self._end()

    async def main(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        self._end()
        self._scope.cancel()

    def _end(self) -> None:
        self.ended.set()
        for log in (self.log, self.second_log):
            log.connection.kill()

    def freeze(self) -> None:
        self.is_frozen = True
        for log in (self.log, self.second_log):
            log.connection.freeze()

    def thaw(self) -> None:
        self.is_frozen = False
        for log in (self.log, self.second_log):
            if not self.ended.is_set():
                log.connection.thaw()

    def disconnect(self, down_s: float) -> None:
        for log in (self.log, self.second_log):
            log.connection.disconnect(down_s)


class Call(Protocol):
    """One HTTP request, as the process sees it."""

    scope: dict[str, Any]

    async def receive(self) -> dict[str, Any]: ...
    async def send(self, message: Any) -> None: ...
    def is_over(self) -> None: ...


class GatewayProcess(Process):
    """`is_open` is true while clients can connect; a supervisor sets `stop`."""

    kind = "gateway"

    def __init__(
        self, broker: MemoryBroker, chance: Chance, name: str, *, served: Collection[str] = ()
    ) -> None:
        super().__init__(broker, chance, name)
        self.stop = anyio.Event()
        self._served = served
        self._opened: gateway.Opened | None = None
        self._tasks: TaskGroup

    @property
    def is_open(self) -> bool:
        return self._opened is not None and not self.stop.is_set() and not self.ended.is_set()

    async def main(self) -> None:
        async with anyio.create_task_group() as self._tasks:
            config = GatewayConfig(
                lane=ids.new_lane_id(self.chance.randbytes(ids.RANDOM_BYTES)),
                shard=self.shard,
                models=MODELS,
                served=self._served,
                secret=SECRET,
                entropy=self.chance.randbytes,
            )
            self._opened = await gateway.open_gateway(self.log, self.second_log, config, self._tasks)
            await self.stop.wait()
            await self._opened.end_streams()
            await self._opened.close()
            self._tasks.cancel_scope.cancel()

    @property
    def followed(self) -> list[str]:
        """The requests that the gateway still follows."""
        readers = self._opened.lanes.every() if self._opened is not None else []
        return [request for reader in readers for request in reader.followed]

    def serve(self, call: Call) -> None:
        assert self.is_open, "the gateway does not listen"
        self._tasks.start_soon(self._serve, call)

    async def _serve(self, call: Call) -> None:
        assert self._opened is not None, "a gateway that listens is open"
        try:
            await self._opened.app(call.scope, call.receive, call.send)
        finally:
            call.is_over()


class Engine(SimEngine):
    """Tracks its attempts, freezes with its process, and hangs if `hangs` is set."""

    def __init__(self, process: Process) -> None:
        super().__init__(MODELS[MODEL], PROFILE, sleep=self._pass)
        self.running: dict[str, float] = {}
        self.hangs = False
        self._process = process

    async def _pass(self, seconds: float) -> None:
        await anyio.sleep(seconds)
        if self.hangs:
            await anyio.sleep_forever()
        await self._process.log.connection.thawed()

    async def generate(
        self,
        attempt: str,
        rendered: Rendered,
        output_ids: Sequence[int],
        *,
        max_tokens: int,
        salt: str,
        emit: Emit,
    ) -> None:
        self.running[attempt] = anyio.current_time()
        try:
            await super().generate(attempt, rendered, output_ids, max_tokens=max_tokens, salt=salt, emit=emit)
        finally:
            del self.running[attempt]


class WorkerProcess(Process):
    kind = "worker"

    def __init__(self, broker: MemoryBroker, chance: Chance, name: str) -> None:
        super().__init__(broker, chance, name)
        self.leaving = Shutdown()
        self.engine = Engine(self)
        self.serving = Serving(unfilled_max=UNFILLED_MAX)

    @property
    def at_work(self) -> list[str]:
        """The requests and attempts that the worker still holds, in its engine or not."""
        requests = [claim.request.text for worker in self.serving.workers for claim in worker.claims.held]
        return requests + list(self.engine.running)

    async def main(self) -> None:
        starting = ReplicaStarting(replica=self.name, model=MODEL, engine="sim")
        await say(self.log, starting)
        replica = ReplicaAnnouncer(self.log, starting)
        await serve_shards(
            self.log, self.engine, replica, self.leaving, self.serving, entropy=self.chance.randbytes
        )
        await say(self.log, ReplicaStopped(replica=self.name, model=MODEL, why="drained"))


async def from_the_first(stream: str) -> int:
    return 1


class JanitorProcess(Process):
    """A janitor for each shard, as a leader has. One that a silent shard has ended begins anew."""

    kind = "janitor"

    async def main(self) -> None:
        async with anyio.create_task_group() as tasks:

            def supervise(shard: int) -> None:
                tasks.start_soon(self._keep, shard)

            supervise(0)
            await shards.follow(self.log, 1, supervise)

    async def _keep(self, shard: int) -> None:
        while not self.ended.is_set():
            with suppress(LogError):
                await Janitor(self.log, shard=shard).run(from_the_first)
            await anyio.sleep(RETRY_S)


class Supervisor:
    """Replaces processes that end, and reports most workers that do. `shards` is the number of open ones."""

    def __init__(self, broker: MemoryBroker, chance: Chance, tasks: TaskGroup) -> None:
        self.processes: list[Process] = []
        self.is_calm = False
        self.shards = 1
        self._broker, self._chance, self._tasks = broker, chance, tasks
        self._log = MemoryLog(broker)
        self.started = 0

    def start(self, kind: type[Process]) -> None:
        self.started += 1
        process = kind(self._broker, self._chance, f"{kind.kind}{self.started}")
        if kind is GatewayProcess:
            process.shard = self._least_used()
        self.processes.append(process)
        self._tasks.start_soon(partial(self._keep, process))

    def _least_used(self) -> int:
        """Return the first open shard of those with the fewest gateways."""
        used = [gateway.shard for gateway in self.processes if isinstance(gateway, GatewayProcess)]
        return min(range(self.shards), key=used.count)

    async def _keep(self, process: Process) -> None:
        await process.run()
        self.processes.remove(process)
        noticed = self._chance.random() < 0.7
        if isinstance(process, WorkerProcess) and not process.leaving.is_requested and noticed:
            await anyio.sleep(self._chance.uniform(0.0, NOTICED_S))
            cause: Any = "host" if process.why is None else "engine"
            await say(self._log, ReplicaLost(replica=process.name, model=MODEL, cause=cause))
        if not self.is_calm:
            await anyio.sleep(self._chance.uniform(0.0, 8.0))
        self.start(type(process))

    def gateways(self) -> list[GatewayProcess]:
        return [p for p in self.processes if isinstance(p, GatewayProcess) and p.is_open]

    def workers(self) -> list[WorkerProcess]:
        return [p for p in self.processes if isinstance(p, WorkerProcess)]


async def say(log: MemoryLog, event: AnyEvent) -> None:
    """Append to the fleet's stream, retrying until it succeeds."""
    data = codec.encode("supervisor", [event])
    subject = subjects.fleet(subjects.slug(MODEL))
    while True:
        try:
            await append_until_known(log, subjects.FLEET, subject, data, within_s=SAY_S)
            return
        except LogError:
            await anyio.sleep(RETRY_S)
