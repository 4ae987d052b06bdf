"""The two servers: Rift as started by `rift up`, and the engine's own server with the same arguments.

Each runs alone in its own folder, and is ended with all its processes. Their cost comes from the kernel's
accounting, by role.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from events.subjects import BOOK, FLEET
from rift.catalogue import Profile
from tests.chaos.rig import free_port, role_of
from tests.service import ROOT, environment

READY_S = 180.0
STOP_S = 20.0
POLL_S = 0.05

MODEL = "bench"

# `rift up` with nats-server's default interval of syncs, to show the cost of durability.
NOT_DURABLE = """
import sys
from rift import cli
from rift.broker.configuration import Server
durable = Server.text
def text(server):
    text = durable(server)
    assert "sync_interval: always" in text
    return text.replace("sync_interval: always", "")
Server.text = text
sys.exit(cli.main(sys.argv[1:]))
"""

CONFIG = """
model = "{model}"
broker_unchecked = {unchecked}
[models.{model}]
title = "The benchmark's model"
source = {source}
context_tokens = {context_tokens}
tool_parser = {tool_parser}
tool_strict_level = "parameter"
prompt_usd = "0.01"
output_usd = "0.02"
[models.{model}.profiles.cpu]
args = {args}
env = {env}
"""

# Quiet the engine's own server like Rift's worker: without statistics, and without a line per request.
QUIET = ("--disable-log-stats", "--disable-uvicorn-access-log", "--uvicorn-log-level", "warning")


class ServerBroken(Exception):
    """A server did not become ready; the message has its output."""


class Served(NamedTuple):
    """The model that both servers serve."""

    path: Path
    context_tokens: int
    profile: Profile
    tool_parser: str = ""


class Running(NamedTuple):
    """A server that is ready. `main` is its first process, which started the others.

    `monitor` is the monitoring URL of its broker, if it has one.
    """

    url: str
    key: str
    main: int
    monitor: str | None = None

    def records(self) -> int | None:
        """Return how many records of requests the log has taken so far; None without a log."""
        if self.monitor is None:
            return None
        (account,) = httpx.get(f"{self.monitor}/jsz?accounts=true&streams=true").json()["account_details"]
        return sum(
            int(stream["state"]["last_seq"])
            for stream in account["stream_detail"]
            if stream["name"] not in (FLEET, BOOK)
        )

    def cpu_s(self) -> Counter[str]:
        """Return the CPU seconds used so far, by role; `engine` stands for a server's engine processes."""
        used: Counter[str] = Counter()
        for pid, role in self.roles().items():
            used[role] += cpu_s_of(pid)
        return used

    def peak_mb(self) -> Counter[str]:
        """Return the peak memory of each role."""
        peak: Counter[str] = Counter()
        for pid, role in self.roles().items():
            with suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                peak[role] += int(status.partition("VmHWM:")[2].split()[0]) // 1024
        return peak

    def roles(self) -> dict[int, str]:
        roles: dict[int, str] = {}
        for pid, parent in _descendants(self.main):
            with suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                role = "api-server" if "vllm.entrypoints.openai.api_server" in command else role_of(command)
                is_engine = roles.get(parent) in ("worker", "api-server", "engine")
                roles[pid] = "engine" if is_engine else role or "guard"
        return roles


@contextmanager
def rift(
    served: Served, folder: Path, *, durable: bool = True, options: Sequence[str] = (), settings: str = ""
) -> Iterator[Running]:
    """Run `rift up` with one worker for the model, or as set by `options` and more `settings` in TOML.

    Raises ServerBroken.
    """
    folder.mkdir(parents=True)
    config = folder / "rift.toml"
    config.write_text(
        CONFIG.format(
            model=MODEL,
            unchecked=json.dumps(not durable),
            source=json.dumps(str(served.path)),
            context_tokens=served.context_tokens,
            tool_parser=json.dumps(served.tool_parser),
            args=_table(served.profile.args),
            env=_table(served.profile.env),
        )
        + settings
    )
    start = ["-P", "-m", "rift"] if durable else ["-c", NOT_DURABLE]
    arguments = ["--data", str(folder / "data"), "--config", str(config), "--port", "0", "--json"]
    with _process([*start, "up", *arguments, *options], folder, environment()) as process:
        assert process.stdout is not None, "the process has a pipe"
        line = process.stdout.readline()
        if not line:
            raise ServerBroken(f"rift up did not start: {_output(folder)}")
        ready = json.loads(line)
        monitor = (folder / "data" / "nats" / "monitor").read_text().strip()
        yield Running(ready["url"], ready["api_key"], process.pid, monitor)


@contextmanager
def peer(served: Served, folder: Path) -> Iterator[Running]:
    """Run vLLM's OpenAI server with the arguments that Rift gives its engine. Raises ServerBroken."""
    port = free_port()
    folder.mkdir(parents=True)
    model = ["--model", str(served.path), "--served-model-name", MODEL]
    engine = ["--max-model-len", str(served.context_tokens)]
    if served.tool_parser:
        engine += ["--enable-auto-tool-choice", "--tool-call-parser", served.tool_parser]
        engine += ["--tool-strict-level", "parameter"]
    for name, value in served.profile.args.items():
        engine += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    variables = {**environment(), **quiet, "VLLM_WORKER_MULTIPROC_METHOD": "spawn", **served.profile.env}
    command = ["-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    with _process([*command, *model, *engine, *QUIET], folder, variables) as process:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + READY_S
        while not _is_healthy(url):
            if process.poll() is not None or time.monotonic() > until:
                raise ServerBroken(f"vLLM's server did not start: {_output(folder)}")
            time.sleep(POLL_S)
        yield Running(url, "none", process.pid)


@contextmanager
def _process(
    arguments: Sequence[str], folder: Path, variables: dict[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a Python process, and at the end kill it with all processes that it started."""
    with (folder / "screen.txt").open("wb") as screen:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=screen,
            env=variables,
            cwd=ROOT,
            process_group=0,
        )
    try:
        yield process
    finally:
        started = [pid for pid, _ in _descendants(process.pid)]
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=STOP_S)
        for pid in started:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def _table(values: Mapping[str, Any]) -> str:
    """Return an inline table of TOML, whose scalars are written as in JSON."""
    return f"{{{', '.join(f'{name} = {json.dumps(value)}' for name, value in values.items())}}}"


def _output(folder: Path) -> str:
    return (folder / "screen.txt").read_text()[-4000:]


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def _descendants(main: int) -> list[tuple[int, int]]:
    """Return `main` and its descendants, each with its parent, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            children.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
    processes = [(main, 0)]
    for pid, _ in processes:
        processes += [(child, pid) for child in children.get(pid, [])]
    return processes


def cpu_s_of(pid: int) -> float:
    """Read the process's CPU clock, which counts nanoseconds; /proc counts ticks of 10 ms."""
    with suppress(OSError):
        # Linux's number of that clock, for any process (MAKE_PROCESS_CPUCLOCK in its sources).
        return time.clock_gettime(~pid << 3 | 2)
    return 0.0


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name, which may contain any character."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
