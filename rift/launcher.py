"""`rift up`: the whole installation on this machine, in the foreground.

    start:   broker → book → control → gateway → the decided number of workers → ready
    Ctrl-C:  gateway → workers → control → broker

Control decides the number of workers, not this module.
"""

import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from rift import __version__, nats_server, startup
from rift.control.projection import continuity
from rift.data_dir import DataDir, DataDirError
from rift.fleet.decision_reader import drive
from rift.fleet.local import WORKER_STOP_S, Host, LocalFleet, declare_lost
from rift.log_disk.reserve import Reserve
from rift.log_disk.watch import Broker, LogDisk, ask_health
from rift.settings import Settings
from rift.supervisor import LOGS_POLL_S, Child, Guard, Parent, is_killed, shorten_logs, words

PROMPT = "Explain quantum computing to a 12-year-old."

# vLLM by default binds every engine of a machine to the same core.
CORES = "VLLM_CPU_OMP_THREADS_BIND"

# How long each kind of process may take to stop, together below the 10 s that are promised: the streams' last
# frames; the attempts' releases and the engine's end; the last transaction; the last write.
STOP_S = {"gateway": 2.5, "worker": WORKER_STOP_S, "control": 1.8, "nats": 1.0}

# The start waits for these, so it gives up if one of them fails this often, which takes 3 s of back-off.
AWAITED = ("nats", "gateway")
START_FAILURES_MAX = 4


class Launcher:
    """Start and stop the processes of one installation.

    `options` go to every role, `serving` to gateway and control. `notify` shows a line to the operator,
    `greet` shows the URL and the API key.
    """

    def __init__(
        self,
        installation: DataDir,
        settings: Settings,
        options: Sequence[str],
        *,
        serving: Sequence[str],
        notify: Callable[[str], None],
        greet: Callable[[str, str], None],
    ) -> None:
        self._installation = installation
        self._settings = settings
        self._notify = notify
        self._greet = greet
        self._options = ["--data", str(installation.folder), *options]
        self._serving = serving
        self._parent = Parent(installation.logs, Guard(), notify)
        temporary = str(installation.temporary)
        # Its processes must not use the broker that the variable names for other commands.
        self._environment = {"TMPDIR": temporary, "VLLM_RPC_BASE_PATH": temporary, "RIFT_NATS_URL": ""}
        self._children: dict[str, Child] = {}
        self._fleet: LocalFleet | None = None
        self._is_serving = False

    async def run(self) -> None:
        """Run until SIGINT, SIGTERM or SIGHUP, and stop everything. Raises what prevents a start."""
        port = self._port()
        self._installation.clear_temporary()
        self._installation.temporary.mkdir(mode=0o700)
        # Stops in the opposite order of starting.
        started = AsyncExitStack()
        started.callback(self._installation.clear_temporary)
        started.callback(self._parent.guard.dismiss)
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as received:
            try:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._start, tasks, started, port)
                    async for _ in received:
                        self._notify("rift stops")
                        tasks.cancel_scope.cancel()
                        break
            finally:
                with anyio.CancelScope(shield=True):
                    await started.aclose()

    async def _start(self, tasks: TaskGroup, started: AsyncExitStack, port: int) -> None:
        settings = self._settings
        folder = self._installation.folder
        self._notify(f"rift {__version__} starts in {folder}")
        began_s = anyio.current_time()
        reserve = self._installation.reserve(None, {})
        assert reserve is not None, "the broker is embedded"
        with _naming_disk(reserve):
            self._installation.nats.mkdir(mode=0o700, exist_ok=True)
            reserve.check_start()
            address = nats_server.configure(self._installation.nats, settings.catalogue())
        start = partial(self._start_child, tasks, started)
        start("nats", lambda: nats_server.command(self._installation.nats))
        log = await startup.connected(self._installation)
        started.push_async_callback(log.close)
        await continuity.check_folder(log, self._installation)
        with _naming_disk(reserve):
            reserve.restore()
        began_s = self._done("the log (nats-server)", began_s)
        tasks.start_soon(self._disk(reserve, address).watch)
        tasks.start_soon(self._keep_house)
        check = await startup.prepared(log, settings, address.monitor)
        tasks.start_soon(check.watch)
        key = await startup.write_book(log, self._installation, settings, self._notify)
        if settings.fleet == "local":
            await declare_lost(log)
        # Any number of roles on one machine: each serves its metrics on a free port, but for the gateway.
        start("control", partial(self._role, "control", *self._serving, *self._metrics()))
        if settings.fleet == "local":
            fleet = self._fleet = LocalFleet(log, self._host())
            started.push_async_callback(self._stop_workers, fleet)
            tasks.start_soon(fleet.run)
            tasks.start_soon(drive, log, fleet)
        listen = ["--host", settings.host, "--port", str(port), "--metrics", settings.metrics]
        start("gateway", partial(self._role, "gateway", *self._serving, *listen))
        url = settings.url(port)
        await startup.gateway_ready(url, key, self._notify)
        self._is_serving = True
        began_s = self._done("the gateway", began_s)
        scale = settings.scales().get(settings.model)
        if scale is not None and scale.min and settings.fleet == "local":
            await startup.model_ready(log, settings.model, self._notify)
            engine = (
                "the simulated engine, whose answers mean nothing" if settings.engine == "sim" else "vLLM"
            )
            self._done(f"{settings.model} in {engine}", began_s)
        elif scale is not None and not scale.min:
            self._notify(f"no worker serves {settings.model} yet: the first request starts one")
        elif scale is None and settings.fleet == "local":
            self._notify(f"{settings.model} is not served, because its number of workers is 0")
        self._greet(url, key)

    def _done(self, what: str, began_s: float) -> float:
        """Show that a step of the start is done, and return when the next began."""
        now_s = anyio.current_time()
        self._notify(f"  {what}: {now_s - began_s:.1f} s")
        return now_s

    def _start_child(
        self, tasks: TaskGroup, started: AsyncExitStack, name: str, command: Callable[[], Sequence[str]]
    ) -> None:
        failures = 0

        async def ended(status: int) -> None:
            nonlocal failures
            failures += not is_killed(status)
            if name in AWAITED and not self._is_serving and failures >= START_FAILURES_MAX:
                raise DataDirError(
                    f"{name} ended {failures} times while Rift started, at last with {words(status)}: "
                    f"{child.last_line()}; its log is {child.log}"
                )

        child = self._children[name] = Child(
            name, command, self._parent, environment=self._environment, ended=ended
        )
        child.start()
        started.push_async_callback(child.stop, STOP_S[name])
        tasks.start_soon(child.supervise)

    def _disk(self, reserve: Reserve, address: nats_server.Address) -> LogDisk:
        assert address.monitor is not None, "the broker is embedded"

        def hurry() -> None:
            for child in (*self._children.values(), *(self._fleet.children if self._fleet else ())):
                child.hurry()

        broker = Broker(partial(ask_health, address.monitor), self._children["nats"].restart, hurry)
        return LogDisk(reserve, broker, self._notify)

    async def _keep_house(self) -> None:
        while True:
            shorten_logs(self._installation.logs)
            self._parent.guard.check()
            await anyio.sleep(LOGS_POLL_S)

    async def _stop_workers(self, fleet: LocalFleet) -> None:
        async with anyio.create_task_group() as tasks:
            for child in fleet.children:
                tasks.start_soon(child.stop, STOP_S["worker"] + self._settings.drain_s)

    def _host(self) -> Host:
        return Host(
            serves=frozenset(self._settings.scales()),
            command=lambda model, replica: self._role(
                "worker", "--model", model, "--replica", replica, *self._metrics()
            ),
            environment=self._worker_environment,
            parent=self._parent,
        )

    def _worker_environment(self, model: str, place: int) -> Mapping[str, str]:
        """Give each CPU engine cores of its own if there can be several."""
        settings = self._settings
        profile = settings.catalogue_profile(model)
        places = sum(scale.max for scale in settings.scales().values())
        if profile.gpus or places < 2 or CORES in {**os.environ, **profile.env}:
            return self._environment
        cores = share(sorted(os.sched_getaffinity(0)), place, places)
        return self._environment | {CORES: ",".join(map(str, cores))}

    def _role(self, role: str, *more: str) -> list[str]:
        return [sys.executable, "-P", "-m", "rift", role, *self._options, *more]

    def _metrics(self) -> list[str]:
        where = self._settings.metrics_address(0)
        return ["--metrics", str(where._replace(port=0)) if where else ""]

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
                    f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); "
                    "choose another --port or --host"
                ) from error
            port: int = probe.getsockname()[1]
            return port


@contextmanager
def _naming_disk(reserve: Reserve) -> Iterator[None]:
    """Raise DataDirError for an OSError of the log's disk, such as one that is full or read-only."""
    try:
        yield
    except OSError as error:
        raise DataDirError(f"{reserve.trouble()} ({error.strerror})") from error


def greeting(url: str, key: str, model: str) -> str:
    """Return the text that is shown when Rift is ready: URL, API key, the playground, a command to paste."""
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
    return (
        f"rift is ready: {url}\nAPI key: {key}\n\n"
        f"Open {url} in a browser and enter the key, or send a request from another terminal:\n{curl}\n\n"
        "Ctrl-C stops everything; the next start continues with the same data and key."
    )


def role_options(settings: Settings, config: Path | None) -> list[str]:
    """Return the options of every role, besides the data folder."""
    options = ["--engine", settings.engine]
    return [*options, "--config", str(config)] if config else options


def serving_options(settings: Settings, workers: str | None) -> list[str]:
    """Return the options of gateway and control that name the models to serve."""
    options = ["--model", settings.model]
    return [*options, "--workers", workers] if workers is not None else options


def share(cores: Sequence[int], place: int, places: int) -> Sequence[int]:
    """Return the cores of one place. Places share a core only if there are fewer cores than places."""
    groups = min(places, len(cores))
    return cores[place % groups :: groups]
