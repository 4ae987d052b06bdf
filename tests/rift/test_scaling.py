"""Workers scale from zero under load and back, following the decisions in the log.

`tests/conformance/test_peer.py` does the same with the real engine.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.service import Service, environment, frames, joined, running, until

LOAD = """
[scale."load:1"]
idle_s = 4

[models."load:1"]
source = "/simulated"
context_tokens = 4096
prompt_usd = "0.10"
output_usd = "0.35"

[models."load:1".profiles.cpu.sim]
step_us = 20_000
running_max = 4
start_ms = 500
"""

STREAMS, TOKENS = 24, 60
# A decision every 2 s, an idle time of 4 s, and the start and stop of processes on a busy machine.
ZERO_S = 40.0

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def up(folder: Path, settings: str, *options: str) -> Iterator[Service]:
    folder.mkdir()
    (folder / "rift.toml").write_text(settings)
    service = Service(folder, *options).start()
    try:
        yield service
    finally:
        service.stop()
    assert [line for _, line in running() if str(folder) in line] == []


def workers(service: Service) -> list[int]:
    """Return the processes of the workers and their engines."""
    mark = str(service.folder).encode()
    found = []
    for pid, line in running():
        with contextlib.suppress(OSError):
            ours = mark in (Path("/proc") / str(pid) / "environ").read_bytes()
            if ours and not any(f" rift {part}" in line for part in ("up", "control", "gateway")):
                found.append(pid)
    return [pid for pid in found if "nats-server" not in (Path("/proc") / str(pid) / "cmdline").read_text()]


def replicas(service: Service) -> int:
    """Return the number of replicas in the last decision."""
    (row,) = service.sql(
        "select coalesce(arg_max(to_replicas, stored_at_ns), 0) as n from decisions where counts"
    )
    return int(row["n"])


def scaled_to_zero(service: Service) -> None:
    deadline = time.monotonic() + ZERO_S
    while time.monotonic() < deadline and (replicas(service) or workers(service)):
        time.sleep(0.3)
    assert replicas(service) == 0
    assert workers(service) == []


def stream(service: Service, model: str, prompt: str, tokens: int) -> list[dict[str, Any]]:
    body = {"model": model, "prompt": prompt, "parameters": {"max_tokens": tokens}, "stream": True}
    with (
        service.client() as client,
        client.stream("POST", "/v1/inference", json=body, timeout=200) as response,
    ):
        assert response.status_code == 200
        return list(frames(response))


def test_a_load_step_scales_from_zero_to_four_and_back_while_the_leader_is_killed(tmp_path: Path) -> None:
    options = ("--engine", "sim", "--model", "load:1", "--workers", "0..4")
    with up(tmp_path / "data", LOAD, *options) as service, standby(service):
        assert workers(service) == []
        (leader,) = [pid for pid, line in running() if f"rift control --data {service.folder} " in line]
        with ThreadPoolExecutor(STREAMS) as clients:
            told = [clients.submit(stream, service, "load:1", f"{n}", TOKENS) for n in range(STREAMS)]
            until(service, "select 1 from decisions where to_replicas = 4", within_s=20)
            os.kill(leader, signal.SIGKILL)
            killed_at = time.monotonic()
            until(service, "select 1 from elections where counts and epoch > 1", within_s=10)
            assert time.monotonic() - killed_at < 5 + 2, (
                "another leads within 5 s (and a command took its time)"
            )
            answers = [future.result() for future in told]
        for events in answers:
            assert events[-1]["event"] == "done"
            assert events[-1]["data"]["usage"]["output_tokens"] == TOKENS
            assert joined(events)
        scaled_to_zero(service)
        (row,) = service.sql("select count(*) as n from requests where state = 'finished'")
        assert row["n"] == STREAMS
        assert service.sql("select 1 from replicas where state not in ('stopped')") == []
        for row in service.sql("select lived_ns, lifetime_ns, gpus from replicas where state = 'stopped'"):
            assert 0 < row["lived_ns"] <= row["lifetime_ns"] + 10**9
        counted = service.sql("select from_replicas, to_replicas, reason from decisions where counts")
        assert all(row["reason"] for row in counted)
        assert [row["from_replicas"] for row in counted[1:]] == [row["to_replicas"] for row in counted[:-1]]
        done = service.rift("replay", "--verify")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "decisions" in done.stdout


@contextlib.contextmanager
def standby(service: Service) -> Iterator[None]:
    """Run a second control process with its own database."""
    database = service.folder / "standby.duckdb"
    command = [sys.executable, "-P", "-m", "rift", "control", "--database", str(database)]
    told = ["--data", str(service.folder), *service.options]
    log = (service.folder / "logs" / "standby.log").open("wb")
    process = subprocess.Popen([*command, *told], env=environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while not database.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        log.close()
