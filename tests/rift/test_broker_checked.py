"""Roles as processes refuse a broker that acknowledges records before they are on disk."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from rift.data_dir import DataDir
from tests.chaos.rig import free_port
from tests.conftest import Server
from tests.service import environment

WITHIN_S = 30.0


class Roles:
    """Roles of one installation with a broker of their own."""

    def __init__(self, folder: Path) -> None:
        (folder / "nats").mkdir()
        self.server = Server(folder / "nats", ["smollm2-135m"])
        self.port = free_port()
        self._folder = folder / "data"
        DataDir(self._folder).make()
        self._started: list[subprocess.Popen[str]] = []

    def set(self, toml: str) -> None:
        (self._folder / "rift.toml").write_text(f'engine = "sim"\nport = {self.port}\n{toml}\n')

    def reconfigure(self, old: str, new: str) -> None:
        file = self.server.folder / "nats.conf"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    def start(self, role: str) -> "subprocess.Popen[str]":
        nats = self.server.address.url
        command = [sys.executable, "-m", "rift", role, "--data", str(self._folder), "--nats", nats]
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=environment() | self.server.environment
        )
        self._started.append(process)
        return process

    def refused(self, *roles: str) -> list[str]:
        """Return what each role says before it ends."""
        processes = [self.start(role) for role in roles]
        said = [process.communicate(timeout=WITHIN_S)[1] for process in processes]
        assert [process.returncode for process in processes] == [1] * len(roles), said
        return said

    def until_ready(self) -> None:
        deadline = time.monotonic() + WITHIN_S
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/readyz").raise_for_status()
                return
            except httpx.HTTPError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def stop(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()
        self.server.kill()


@pytest.fixture
def roles(tmp_path: Path) -> Iterator[Roles]:
    made = Roles(tmp_path)
    made.server.start()
    yield made
    made.stop()


def test_a_role_refuses_a_broker_that_it_cannot_check(roles: Roles) -> None:
    roles.set("")
    for said in roles.refused("worker", "control"):
        assert all(name in said for name in ("sync_interval: always", "nats_monitor", "broker_unchecked")), (
            said
        )
        assert "Traceback" not in said


def test_a_gateway_ends_when_its_broker_returns_without_durability(roles: Roles) -> None:
    roles.set(f'nats_monitor = "{roles.server.address.monitor}"')
    gateway = roles.start("gateway")
    # Only control may create the streams that the gateway waits for.
    control = roles.start("control")
    roles.until_ready()
    control.terminate()
    control.communicate(timeout=WITHIN_S)
    roles.server.kill()
    roles.reconfigure("  sync_interval: always\n", "")
    roles.server.start()
    _, said = gateway.communicate(timeout=WITHIN_S)
    assert gateway.returncode == 1
    assert "rift: nats-server rift" in said
    assert "sync_interval is not always" in said
    roles.set(f'nats_monitor = "{roles.server.address.monitor}"\nbroker_unchecked = true')
    overridden = roles.start("gateway")
    roles.until_ready()
    overridden.terminate()
    _, said = overridden.communicate(timeout=WITHIN_S)
    assert overridden.returncode == 0
    assert "WARNING" in said
    assert "broker_unchecked is set: nats-server rift" in said
