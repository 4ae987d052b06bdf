"""A whole installation as a user starts it: `rift up` in its own process and folder."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
READY_S = 120.0
MODEL = "smollm2:135m"


class Service:
    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.options = options
        self.screen: list[str] = []
        self.url = self.key = ""

    def start(self, folder: Path | None = None) -> "Service":
        """Start in `folder` (default: this one), and return when the screen shows that Rift is ready."""
        command = [sys.executable, "-P", "-m", "rift", "up", "--data", str(self.folder), "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *self.options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
            cwd=folder,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.screen.append(line)
            if found := re.match(r"rift is ready: (\S+)", line):
                self.url = found[1]
            if found := re.match(r"API key: (\S+)", line):
                self.key = found[1]
            if self.url and line.startswith("  -d "):
                return self
        raise AssertionError("".join(self.screen) + self.logs())

    def logs(self) -> str:
        return "\n".join(
            f"--- {file.name}\n{file.read_text()}" for file in (self.folder / "logs").glob("*.log")
        )

    def stop(self, number: int = signal.SIGINT) -> float:
        """Return the seconds until it ended."""
        began = time.monotonic()
        self.process.send_signal(number)
        return self.wait(began)

    def wait(self, began: float = 0.0) -> float:
        rest, _ = self.process.communicate(timeout=20)
        self.screen.append(rest)
        return time.monotonic() - began

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def rift(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rift", *arguments, "--data", str(self.folder)]
        variables = environment() | variables
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables)

    def sql(self, select: str) -> list[dict[str, Any]]:
        done = self.rift("sql", "--json", select)
        assert done.returncode == 0, done.stderr
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows

    def processes(self) -> list[int]:
        """Return the ids of this installation's running processes."""
        return [pid for pid, line in running() if str(self.folder) in line]


def running() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if "\nState:\tZ" not in (entry / "status").read_text():
                yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RIFT_")}
    return {**kept, "PYTHONPATH": str(ROOT)}


def frames(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yield each SSE frame as its fields, `data` decoded; comments as {"comment": …}."""
    fields: dict[str, Any] = {}
    for line in response.iter_lines():
        if not line:
            if fields:
                yield fields
            fields = {}
            continue
        name, _, value = line.partition(": ")
        if not name or line.startswith(":"):
            fields["comment"] = line
        elif name == "data" and value != "[DONE]":
            fields["data"] = json.loads(value)
        else:
            fields[name] = value


def joined(events: Sequence[dict[str, Any]]) -> str:
    """Return the text of the tokens, each once and in order. (A busy machine makes fewer, longer ones.)"""
    tokens = [event["data"] for event in events if event["event"] == "token"]
    indices = [token["index"] for token in tokens]
    assert indices == sorted(set(indices)), "each token once, in order"
    return "".join(token["delta"] for token in tokens)


def until(service: Service, select: str, within_s: float = 10.0) -> dict[str, Any]:
    """Return the first row of `select` once there is one."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if rows := service.sql(select):
            return rows[0]
        time.sleep(0.1)
    raise AssertionError(service.sql("select * from requests order by accepted_at_ns desc limit 3"))
