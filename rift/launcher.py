"""`rift up`: the whole installation on this machine, in the foreground.

    broker → book → control → gateway → as many workers as are decided → ready

and, on Ctrl-C, back: gateway, workers, control, broker. How many workers there shall be is not decided here.
"""

import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from events import book as books
from events import codec, fleet, subjects
from events.jetstream import JetStream, connect
from events.log import Log, LogError, append_until_known
from events.schema import ReplicaLost
from rift import __version__, book_admin, nats_server, prices
from rift.catalogue import Profile
from rift.data_dir import DataDir, DataDirError
from rift.fleet.decision_reader import follow
from rift.fleet.local import Host, LocalFleet
from rift.settings import SHARDS, Settings
from rift.supervisor import Child, Guard

FIRST_ACCOUNT = "dev"
WRITER = "up"
PROMPT = "Explain quantum computing to a 12-year-old."

# A broker with a large store reads its index first; an empty one answers in 0.1 s.
BROKER_START_S = 60.0
FLEET_APPEND_S = 30.0


# vLLM's own choice is the same core for every engine of a machine.
CORES = "VLLM_CPU_OMP_THREADS_BIND"

# In order, and together below the 10 s that are promised: streams' last frames, attempts' releases and
# the engine's end, the last transaction, the last write.
STOP_S = {"gateway": 2.5, "worker": 4.6, "control": 1.8, "nats": 1.0}


class Launcher:
    def __init__(
        self,
        installation: DataDir,
        settings: Settings,
        options: Sequence[str],
        *,
        serving: Sequence[str],
        say: Callable[[str], None],
        greet: Callable[[str, str], None],
    ) -> None:
        self._installation = installation
        self._settings = settings
        self._say = say
        self._greet = greet
        self._options = ["--data", str(installation.folder), *options]
        self._serving = serving
        self._guard = Guard()
        temporary = str(installation.temporary)
        self._environment = {"TMPDIR": temporary, "VLLM_RPC_BASE_PATH": temporary}
        self._children: list[Child] = []
        self._fleet: LocalFleet | None = None
        self._log: JetStream

    async def run(self) -> None:
        """Return after SIGINT, SIGTERM or SIGHUP, with everything stopped. Raises what stops a start."""
        port = self._port()
        self._installation.clear_temporary()
        self._installation.temporary.mkdir(mode=0o700)
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        with anyio.open_signal_receiver(*signals) as received:
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._start, tasks, port)
                    async for _ in received:
                        self._say("rift stops")
                        tasks.cancel_scope.cancel()
                        break
            finally:
                with anyio.CancelScope(shield=True):
                    await self._stop()

    async def _start(self, tasks: TaskGroup, port: int) -> None:
        settings = self._settings
        where = self._installation.folder
        self._say(f"rift {__version__} in {where}: starting nats-server, control, gateway")
        nats_server.configure(self._installation.nats)
        self._child(tasks, "nats", lambda: nats_server.command(self._installation.nats))
        self._log = await self._connected()
        await self._log.ensure_streams(
            shards=SHARDS,
            replicas=settings.replicas,
            max_bytes=settings.log_bytes_max,
            retention_days=settings.retention_days,
        )
        key = await self._write_book()
        if settings.fleet == "local":
            await self._write_fleet()
        self._child(tasks, "control", partial(self._role, "control", *self._serving))
        listen = ["--host", settings.host, "--port", str(port)]
        self._child(tasks, "gateway", partial(self._role, "gateway", *self._serving, *listen))
        if settings.fleet == "local":
            self._fleet = LocalFleet(self._log, self._host())
            tasks.start_soon(self._fleet.run)
            tasks.start_soon(follow, self._log, self._fleet)
        await self._ready(settings.host, port)
        self._greet(self._url(port), key)

    async def _stop(self) -> None:
        workers = self._fleet.children if self._fleet is not None else []
        for kind, stop_s in STOP_S.items():
            within_s = stop_s + (self._settings.drain_s if kind == "worker" else 0)
            async with anyio.create_task_group() as tasks:
                for child in reversed([*self._children, *workers]):
                    if child.name.startswith(kind):
                        tasks.start_soon(child.stop, within_s)
            if kind == "control" and hasattr(self, "_log"):
                await self._log.close()
        self._guard.dismiss()
        self._installation.clear_temporary()

    # --- children --------------------------------------------------------------------------------------

    def _child(self, tasks: TaskGroup, name: str, command: Callable[[], Sequence[str]]) -> None:
        child = Child(
            name,
            command,
            logs=self._installation.logs,
            guard=self._guard,
            say=self._say,
            environment=self._environment,
        )
        child.start()
        self._children.append(child)
        tasks.start_soon(child.supervise)

    def _host(self) -> Host:
        return Host(
            serves=frozenset(self._settings.scales()),
            command=lambda model, replica: self._role("worker", "--model", model, "--replica", replica),
            environment=self._worker_environment,
            logs=self._installation.logs,
            guard=self._guard,
            say=self._say,
        )

    def _worker_environment(self, model: str, place: int) -> Mapping[str, str]:
        """Give an engine on the processor cores of its own, where there may be several."""
        settings = self._settings
        profile = settings.catalogue()[model].profiles.get(settings.hardware, Profile())
        places = sum(scale.max for scale in settings.scales().values())
        if profile.gpus or places < 2 or CORES in {**os.environ, **profile.env}:
            return self._environment
        cores = share(sorted(os.sched_getaffinity(0)), place, places)
        return self._environment | {CORES: ",".join(map(str, cores))}

    def _role(self, role: str, *more: str) -> list[str]:
        return [sys.executable, "-P", "-m", "rift", role, *self._options, *more]

    # --- the log ---------------------------------------------------------------------------------------

    async def _connected(self) -> JetStream:
        address = nats_server.address(self._installation.nats)
        assert address is not None, "the broker was configured above"
        with anyio.move_on_after(BROKER_START_S):
            while True:
                try:
                    return await connect(address.url, token=address.token, name=WRITER)
                except LogError:
                    await anyio.sleep(0.05)
        raise DataDirError(f"nats-server does not answer; see {self._installation.logs / 'nats.log'}")

    async def _write_book(self) -> str:
        """Open the first account and price the catalogue's models, if that is not done; return the key."""
        book = await books.read(self._log)
        await book_admin.open_account(self._log, book, FIRST_ACCOUNT)
        if (published := prices.default(self._settings.catalogue(), book)) is not None:
            await prices.publish(self._log, published)
        file = self._installation.first_key
        held = book.authenticate(file.read_text().strip()) if file.exists() else None
        if held is not None and held.state(book.at_ns) == "valid":
            return file.read_text().strip()
        key = await book_admin.issue_key(self._log, FIRST_ACCOUNT)
        nats_server.write_secret(file, key.text)
        return key.text

    async def _write_fleet(self) -> None:
        """Nothing runs yet: what the fleet's stream still calls alive was lost with the last start."""
        found = await fleet.read(self._log)
        for model, replicas in found.replicas.items():
            for replica in replicas:
                lost = ReplicaLost(replica=replica, model=model, why="found dead at the start", cause="host")
                await self._say_fleet(model, lost)

    async def _say_fleet(self, model: str, event: ReplicaLost) -> None:
        subject = subjects.fleet(subjects.slug(model))
        data = codec.encode(WRITER, [event])
        await append_until_known(self._log, subjects.FLEET, subject, data, within_s=FLEET_APPEND_S)

    # --- ready -----------------------------------------------------------------------------------------

    def _port(self) -> int:
        """Return the port to listen on. Raises DataDirError if it is taken."""
        settings = self._settings
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((settings.host, settings.port))
            except OSError as error:
                raise DataDirError(
                    f"{settings.host}:{settings.port} cannot be listened on ({error.strerror}); "
                    "choose another --port"
                ) from error
            port: int = probe.getsockname()[1]
            return port

    async def _ready(self, host: str, port: int) -> None:
        """Return once the gateway answers and the default model is ready, unless a request starts it."""
        while not await _gateway_answers(host, port):  # noqa: ASYNC110  # another process
            await anyio.sleep(0.05)
        model = self._settings.model
        scale = self._settings.scales().get(model)
        if scale is not None and scale.min and self._fleet is not None:
            await _model_ready(self._log, model)
        elif scale is not None and not scale.min:
            self._say(f"no worker serves {model} yet: the first request starts one")

    def _url(self, port: int) -> str:
        host = self._settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def greeting(url: str, key: str, model: str) -> str:
    """Return what the screen says once all is ready: where, with which key, and a line to paste."""
    body = {
        "model": model,
        "prompt": PROMPT,
        "parameters": {"temperature": 0.2, "max_tokens": 300},
        "stream": True,
    }
    curl = (
        f"curl -N {url}/v1/inference \\\n  -H 'Authorization: Bearer {key}' \\\n"
        f"  -H 'Content-Type: application/json' \\\n  -d {shlex.quote(json.dumps(body))}"
    )
    return f"rift is ready: {url}\nAPI key: {key}\n{curl}"


async def _gateway_answers(host: str, port: int) -> bool:
    try:
        async with await anyio.connect_tcp(host, port) as stream:
            await stream.send(b"GET /readyz HTTP/1.1\r\nHost: rift\r\nConnection: close\r\n\r\n")
            return (await stream.receive()).startswith(b"HTTP/1.1 200")
    except (OSError, anyio.EndOfStream):
        return False


async def _model_ready(log: Log, model: str) -> None:
    found = await fleet.read(log)
    async with log.follow(subjects.FLEET, ["rift.fleet.>"], after=found.position) as reader:
        while not found.is_ready(model):
            for stored in await anext(aiter(reader)):
                found.fold(stored)


def role_options(settings: Settings, config: Path | None) -> list[str]:
    """What each role is told beside the data folder."""
    options = ["--engine", settings.engine]
    return [*options, "--config", str(config)] if config else options


def serving_options(settings: Settings, workers: str | None) -> list[str]:
    """What gateway and control are told of the models: as `rift up` was."""
    options = ["--model", settings.model]
    return [*options, "--workers", workers] if workers is not None else options


def share(cores: Sequence[int], place: int, places: int) -> Sequence[int]:
    """Return the cores of one place, none of them another's; one that it shares, where there are too few."""
    groups = min(places, len(cores))
    return cores[place % groups :: groups]
