"""The processes under test: a whole `rift up` in its own folder, which never outlives the test."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx
from anyio.abc import TaskGroup

from events import fleet
from events.jetstream import JetStream, connect
from events.log import LogError
from rift import nats_server
from rift import supervisor as processes
from rift.log_disk.reserve import Reserve
from rift.supervisor import Child, Guard, Parent
from tests.chaos.expected import MODEL
from tests.service import environment, running
from tests.small_disk import small_disk

READY_S = 180.0
STOP_S = 20.0
POLL_S = 0.05

# `rift up` without its restart back-off, because these tests kill its children often.
FORGIVING = """
import sys
from rift import cli, supervisor
assert supervisor.WELL_S > 0
supervisor.WELL_S = 0.0
sys.exit(cli.main(sys.argv[1:]))
"""

# A worker whose engine stops in the middle of a step while the file named by the first argument exists. Its
# limit for a silent engine is shorter than a real engine needs.
HANGS = """
import os, sys, anyio
from rift import cli
from rift.engines.sim import SimEngine
from rift.worker import worker
assert worker.HANG_S > 2 and worker.HANG_PER_PROMPT_TOKEN_S > 0
worker.HANG_S, worker.HANG_PER_PROMPT_TOKEN_S = 2.0, 0.0
flag, start = sys.argv[1], SimEngine.__init__
async def hanging(seconds):
    await anyio.sleep(seconds)
    while os.path.exists(flag):
        await anyio.sleep(0.05)
SimEngine.__init__ = lambda engine, *args: start(engine, *args, sleep=hanging)
sys.exit(cli.main(sys.argv[2:]))
"""


class RigBroken(Exception):
    """A process under test did not start or did not recover; the message names it."""


def role_of(command: Sequence[str]) -> str:
    """Return the role of a command line: nats-server, worker, gateway, control, or an empty string."""
    if "nats-server" in command[0]:
        return "nats-server"
    if "-m" in command and command[command.index("-m") + 1] == "rift":
        return command[command.index("-m") + 2]
    return "worker" if "worker" in command else ""


class Rig:
    """`rift up` with workers, a gateway for each further shard, its log, and its processes by role."""

    servers = 1

    def __init__(self, folder: Path, *, engine: str, workers: int, shards: int = 1) -> None:
        self.folder, self.engine, self.workers, self.shards = folder / "data", engine, workers, shards
        self.urls: list[str] = []
        self.environment = environment()
        self.key = ""
        self.log: JetStream
        self.guard = Guard()
        self._screen = folder / "screen.txt"
        self._children: list[Child] = []

    async def start(self, tasks: TaskGroup) -> None:
        """Return once requests are answered. Raises RigBroken."""
        self._tasks = tasks
        processes.WELL_S = 0.0
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.shards > 1:
            self.configure(f"shards = {self.shards}")
        options = ["--data", str(self.folder), "--port", "0", "--engine", self.engine]
        with self._screen.open("wb") as screen:
            self._up = subprocess.Popen(  # noqa: ASYNC220  # returns at once
                [sys.executable, "-c", FORGIVING, "up", *options, "--workers", str(self.workers)],
                stdin=subprocess.DEVNULL,
                stdout=screen,
                stderr=screen,
                env=self.environment,
                start_new_session=True,
            )
        self.guard.add(self._up.pid)
        with anyio.move_on_after(READY_S):
            while not (ready := re.search(r"rift is ready: (\S+)\nAPI key: (\S+)\n", self.screen())):
                if self._up.poll() is not None:
                    break
                await anyio.sleep(POLL_S)
        if not ready:
            raise RigBroken(f"rift up did not become ready: {self.screen()}")
        self.urls, self.key = [ready[1]], ready[2]
        self.log = await self.connected()
        for shard in range(1, self.shards):
            await self.add_gateway("--shard", str(shard))

    def configure(self, *settings: str) -> None:
        """Add lines to `rift.toml`."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self.folder / "rift.toml").open("a") as file:
            file.writelines(f"{line}\n" for line in settings)

    async def add_gateway(self, *options: str) -> None:
        """Start a supervised gateway beside `rift up`, for every later client. Raises RigBroken."""
        port = str(free_port())
        self.role(f"gateway-{port}", "gateway", "--port", port, *options)
        await self.answering(f"http://127.0.0.1:{port}")
        self.urls.append(f"http://127.0.0.1:{port}")

    def role(self, name: str, role: str, *options: str, program: Sequence[str] = ("-m", "rift")) -> None:
        """Start `rift ROLE` outside `rift up`, under the same kind of supervision.

        A worker is another replica at each start. `program` is what Python runs instead of `rift`.
        """

        def command() -> list[str]:
            replica = ["--replica", f"{name}-{secrets.token_hex(4)}"] if role == "worker" else []
            common = [*self.broker_options, "--data", str(self.folder), "--engine", self.engine]
            return [sys.executable, *program, role, *common, *replica, *options]

        child = Child(
            name,
            command,
            Parent(self.folder / "logs", self.guard, notify=lambda text: None),
            environment=self.environment_of(role),
        )
        child.start()
        self._tasks.start_soon(child.supervise)
        self._children.append(child)

    @property
    def broker_options(self) -> list[str]:
        """Return the options with which a command finds the broker, if `rift up` does not run it."""
        return []

    def environment_of(self, command: str) -> dict[str, str]:
        """Return the environment of `rift COMMAND`."""
        return self.environment

    def screen(self) -> str:
        return self._screen.read_text()

    async def connected(self) -> JetStream:
        address = nats_server.address(self.folder / "nats")
        assert address is not None, "rift up has configured its broker"
        return await connect(address.url, address.access("admin"), name="chaos")

    async def stop(self) -> list[str]:
        """Stop everything; return the command lines of processes that still run."""
        await self.stop_children()
        if hasattr(self, "log"):
            await self.log.close()
        if hasattr(self, "_up"):
            for pid in self.pids("worker"):
                _signal(pid, signal.SIGCONT)
            self._up.send_signal(signal.SIGINT)
            with anyio.move_on_after(STOP_S):
                while self._up.poll() is None:  # noqa: ASYNC110  # another process
                    await anyio.sleep(POLL_S)
            status = self._up.poll()
            left = [" ".join(command) for _, command in self.processes()]
            if status != 0:
                left.append(f"rift up itself (exit status {status} within {STOP_S:g} s)")
                _signal(-self._up.pid, signal.SIGKILL)
            return left
        return []

    async def stop_children(self) -> None:
        async with anyio.create_task_group() as tasks:
            for child in self._children:
                tasks.start_soon(child.stop, STOP_S)

    @property
    def runs(self) -> bool:
        """Whether `rift up` runs, or was never started."""
        return not hasattr(self, "_up") or self._up.poll() is None

    # --- processes -----------------------------------------------------------------------------------

    def processes(self) -> list[tuple[int, list[str]]]:
        """Return the id and the command line of each process that names this folder."""
        processes = [(pid, line.split(" ")) for pid, line in running() if str(self.folder) in line]
        return [(pid, words) for pid, words in processes if pid != os.getpid()]

    def pids(self, role: str) -> list[int]:
        return sorted(pid for pid, command in self.processes() if role_of(command) == role)

    def crash(self, replica: str) -> None:
        """End the worker with this name by SIGSEGV, as a fault in its own code would."""
        for pid, command in self.processes():
            if replica in command and role_of(command) == "worker":
                _signal(pid, signal.SIGSEGV)

    async def kill_server(self, victim: int, *, down_s: float) -> None:
        """Kill this nats-server, and return once it is gone. It comes back by itself: at once, or after
        `down_s` where the rig starts it."""
        _signal(victim, signal.SIGKILL)
        while victim in self.pids("nats-server"):  # noqa: ASYNC110  # another process
            await anyio.sleep(0.01)

    async def alive(self, role: str, count: int) -> list[int]:
        """Return the processes of a role once there are at least `count`. Raises RigBroken."""
        pids: list[int] = []
        with anyio.move_on_after(READY_S):
            while len(pids := self.pids(role)) < count and self.runs:  # noqa: ASYNC110  # other processes
                await anyio.sleep(POLL_S)
        if len(pids) < count:
            raise RigBroken(f"{len(pids)} of {count} {role} processes came back: {self.screen()}")
        return pids

    # --- waiting -------------------------------------------------------------------------------------

    async def rift(self, *command: str) -> str:
        """Run a command as an operator does, and return what it prints. Raises RigBroken."""
        line = [sys.executable, "-m", "rift", *command, *self.broker_options, "--data", str(self.folder)]
        done = await anyio.run_process(line, check=False, env=self.environment_of(command[0]))
        if done.returncode != 0:
            output = done.stdout.decode() + done.stderr.decode()
            raise RigBroken(f"rift {' '.join(command)}: {output}")
        return done.stdout.decode()

    async def sql(self, select: str) -> list[dict[str, Any]]:
        """Query with the command line, as an operator does, until control leads. Raises RigBroken."""
        deadline = anyio.current_time() + READY_S
        while True:
            try:
                rows: list[dict[str, Any]] = json.loads(await self.rift("sql", "--json", select))
                return rows
            except RigBroken:
                # While a cluster elects, log and control may not answer for longer than the command waits.
                if anyio.current_time() > deadline:
                    raise

    async def answering(self, url: str) -> None:
        """Return once the gateway is ready. Raises RigBroken."""
        with anyio.move_on_after(READY_S):
            async with httpx.AsyncClient() as http:
                while True:
                    with suppress(httpx.TransportError):
                        if (await http.get(f"{url}/readyz")).status_code == 200:
                            return
                    if not self.runs:
                        break
                    await anyio.sleep(POLL_S)
        raise RigBroken(f"the gateway at {url} did not come back")

    async def settled(self) -> None:
        """Return once the next cycle may begin. Raises RigBroken."""
        await self.log_answers()
        for url in self.urls:
            await self.answering(url)

    async def workers_ready(self) -> None:
        """Return once all workers have reported ready. Raises RigBroken."""
        with anyio.move_on_after(READY_S):
            while True:
                if (await fleet.read(self.log)).count(MODEL, "ready") >= self.workers:
                    return
                await anyio.sleep(POLL_S)
        raise RigBroken(f"not all of {self.workers} workers became ready again: {self.screen()}")

    async def problems(self) -> list[str]:
        """Return what is wrong with the whole installation, after the first cycle and after the last one.

        Raises RigBroken.
        """
        return []

    async def log_answers(self) -> None:
        """Return once the log answers. Raises RigBroken."""
        with anyio.move_on_after(READY_S):
            while True:
                with suppress(LogError):
                    await self.log.last_sequence("RIFT_0")
                    return
                if not self.runs:
                    break
                await anyio.sleep(POLL_S)
        raise RigBroken("the log did not come back")


class TwoGateways(Rig):
    """A second, supervised gateway."""

    async def start(self, tasks: TaskGroup) -> None:
        await super().start(tasks)
        await self.add_gateway()


class Hanging(Rig):
    """One worker's engine hangs while the file `hang` exists."""

    async def start(self, tasks: TaskGroup) -> None:
        self.workers -= 1
        await super().start(tasks)
        self.workers += 1
        self.flag = self.folder / "hang"
        self.role("hanging", "worker", program=("-c", HANGS, str(self.flag)))
        await self.workers_ready()

    def victim(self) -> int:
        workers = [(pid, command) for pid, command in self.processes() if role_of(command) == "worker"]
        (victim,) = [pid for pid, command in workers if str(self.flag) in command]
        return victim


class OnSmallDisk(Rig):
    """`rift up` whose whole folder is on a small disk of its own."""

    # The streams of the smallest log need three quarters of what is free beside the reserve.
    DISK_BYTES = 800 * 1024 * 1024
    LOG_BYTES_MAX = 1 << 28

    async def start(self, tasks: TaskGroup) -> None:
        self._mounted = ExitStack()
        size_bytes = self.DISK_BYTES + (self.shards - 1) * self.LOG_BYTES_MAX * 4 // 3
        self.disk = self._mounted.enter_context(small_disk(self.folder.parent / "disk", size_bytes))
        self.folder = self.disk.path / "data"
        self.configure(f"log_bytes_max = {self.LOG_BYTES_MAX}")
        await super().start(tasks)

    async def fill_disk(self) -> None:
        """Fill the disk until the reserve is released. Raises RigBroken."""
        with anyio.move_on_after(READY_S):
            while Reserve(self.folder / "nats" / "reserve").is_whole():
                self.disk.fill()  # a restarted broker frees a few pages
                await anyio.sleep(POLL_S)
            return
        raise RigBroken(f"the full disk was not noticed: {self.screen()}")

    async def stop(self) -> list[str]:
        with self._mounted:
            return await super().stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
