"""A log, a gateway and control, each in a process of its own, for fleets that the tests start and scale.

Each test has a model of its own, so that one's replicas are not another's.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from events import book as books
from events import codec, subjects
from events.fleet import Fleet, read
from events.jetstream import JetStream, connect
from events.schema import AnyEvent
from rift import book_admin, price_lists, settings
from rift.data_dir import DataDir
from rift.fleet.decision_reader import drive
from rift.fleet.local import Host, LocalFleet
from rift.supervisor import Guard, Parent
from tests.conftest import Server
from tests.deciding import decide
from tests.service import environment, running

MODEL = """
[models."{name}"]
source = "nowhere"
context_tokens = 16384
prompt_usd = "0.01"
output_usd = "0.02"
[models."{name}".profiles.cpu]
gpus = 2
gpu_hour_usd = "1.99"
sim = {{ {pace} }}
"""
PACES = {
    "cold": "start_ms = 1500",
    "crowded": "start_ms = 500, step_us = 5000",
    "narrow": "running_max = 1",
    "retired": "",
    "killed": "",
    "frozen": "",
    "unneeded": "start_ms = 60000",
    "broken": "start_ms = 200",
    "burst": "step_us = 2000",
    "left": "",
}
SERVED = 'model = "cold"\nworkers = "0..4"\n' + "".join(
    f"[scale.{name}]\nmax = 4\n" for name in PACES if name != "cold"
)

# A worker whose engine runs in a process of its own that must be killed.
WORKS = """
import subprocess, sys
from rift import cli
subprocess.Popen(["sleep", "1000"])
sys.exit(cli.main(sys.argv[1:]))
"""

# A worker whose engine does not start, with vLLM's message for missing weights.
FAILS = """
import sys
from rift import cli
from rift.engines import EngineFailed
from rift.engines.sim import SimEngine
async def start(model, profile):
    raise EngineFailed("nowhere does not start: no weights here\\nand more lines")
SimEngine.start = start
sys.exit(cli.main(sys.argv[1:]))
"""

WAIT_S = 60.0


class Place:
    """`url` and `key` are the gateway's, `config` its workers' settings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "data"
        installation = DataDir(self.folder)
        installation.make()
        installation.secret()
        self.config = folder / "served.toml"
        models = "".join(MODEL.format(name=name, pace=pace) for name, pace in PACES.items())
        (folder / "nats").mkdir()
        self.server = Server(folder / "nats", PACES)
        self.environment = environment() | self.server.environment
        monitor = f'nats_monitor = "{self.server.address.monitor}"\n'
        self.config.write_text(monitor + SERVED + models)
        self._by_hand = folder / "by-hand.toml"
        self._by_hand.write_text(monitor + 'fleet = "none"\nmodel = "cold"\n' + models)
        self.guard = Guard()
        self._roles: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self.server.start()
        self.key = anyio.run(self._prepare)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._role("control", "--config", str(self._by_hand))
        self._role("gateway", "--config", str(self.config), "--port", str(port))
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                httpx.get(f"{self.url}/readyz").raise_for_status()
                return
            except httpx.HTTPError:
                assert time.monotonic() < deadline, (self.folder / "logs" / "gateway.log").read_text()
                time.sleep(0.1)

    def stop(self) -> None:
        for role in self._roles:
            role.terminate()
        for role in self._roles:
            role.wait(20)
        self.guard.dismiss()
        self.server.kill()

    async def _prepare(self) -> str:
        known = settings.load(self.config, {}).catalogue()
        async with self.connected() as log:
            await log.ensure_streams(shards=1, replicas=1, max_bytes=1 << 30)
            book = await books.read(log)
            await book_admin.open_account(log, book, "dev")
            published = price_lists.default(known, book)
            assert published is not None, "a new book has no prices"
            await book_admin.publish_prices(log, book, published)
            return (await book_admin.issue_key(log, "dev")).text

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[JetStream]:
        log = await connect(self.server.address.url, self.server.address.access("admin"), name="test")
        try:
            yield log
        finally:
            await log.close()

    def command(self, role: str, *options: str) -> list[str]:
        return [role, "--data", str(self.folder), "--nats", self.server.address.url, *options]

    def _role(self, role: str, *options: str) -> None:
        with (self.folder / "logs" / f"{role}.log").open("ab") as log:
            command = [sys.executable, "-m", "rift", *self.command(role, "--engine", "sim", *options)]
            self._roles.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.environment))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    found = Place(tmp_path_factory.mktemp("place"))
    found.start()
    yield found
    found.stop()


class Rig:
    """One model's fleet on this machine, scaled by the test, and the model's clients."""

    def __init__(self, place: Place, model: str, log: JetStream, http: httpx.AsyncClient) -> None:
        self.model, self.log, self.http = model, log, http
        self._place = place
        self.screen: list[str] = []
        host = Host(
            serves=frozenset([model]),
            command=self._command,
            environment=lambda model, place: self._place.environment,
            parent=Parent(place.folder / "logs", place.guard, self.screen.append),
        )
        self.fleet = LocalFleet(log, host)

    def _command(self, model: str, replica: str) -> Sequence[str]:
        config = ["--engine", "sim", "--config", str(self._place.config)]
        options = self._place.command("worker", *config, "--model", model)
        script = FAILS if model == "broken" else WORKS
        return [sys.executable, "-c", script, *options, "--replica", replica]

    async def sql(self, select: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "rift", *self._place.command("sql", "--json", select)]
        done = await anyio.run_process(command, check=False, env=self._place.environment)
        assert done.returncode == 0, done.stderr.decode()
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows

    async def decide(self, replicas: int, **inputs: int) -> None:
        await decide(self.log, self.model, replicas, **inputs)

    async def say(self, *events: AnyEvent) -> None:
        data = codec.encode("test", events)
        await self.log.append(subjects.FLEET, subjects.fleet(subjects.slug(self.model)), data)

    async def until(self, holds: Callable[[Fleet], bool]) -> Fleet:
        with anyio.move_on_after(WAIT_S):
            while not holds(found := await read(self.log)):  # noqa: ASYNC110  # other processes
                await anyio.sleep(0.05)
            return found
        raise AssertionError((found.replicas, found.wanted, self.screen))

    async def ready(self, replicas: int) -> list[str]:
        """Return the replicas once this many are ready and no others exist."""

        def holds(found: Fleet) -> bool:
            return found.count(self.model, "ready") == len(found.replicas.get(self.model, {})) == replicas

        return list((await self.until(holds)).replicas.get(self.model, {}))

    async def events(self, kind: type) -> list[Any]:
        """Return the fleet's events of a kind that are about the model, in order."""
        target = await self.log.last_sequence(subjects.FLEET)
        topic = [subjects.fleet(subjects.slug(self.model))]
        batches = self.log.scan(subjects.FLEET, topic, first=1, target=target)
        records = [stored async for batch in batches for stored in batch]
        return [event for stored in records for event in codec.decode(stored.data)[1] if type(event) is kind]

    def pid(self, replica: str) -> int:
        """Return the process of a replica, which leads its group."""
        (pid,) = [pid for pid, line in running() if f"--replica {replica}" in line]
        return pid

    async def until_gone(self, group: int) -> None:
        """Return once no process of the group is left."""
        with anyio.fail_after(5):
            while any(_group(pid) == group for pid, _ in running()):  # noqa: ASYNC110  # other processes
                await anyio.sleep(0.05)

    def body(self, tokens: int, **more: object) -> dict[str, object]:
        return {"model": self.model, "prompt": "Hello", "parameters": {"max_tokens": tokens}, **more}

    async def frames(self, tokens: int) -> list[tuple[str, dict[str, Any]]]:
        """Return the events of a native stream to its end, each with its data."""
        found: list[tuple[str, dict[str, Any]]] = []
        kind = ""
        asked = self.body(tokens, stream=True)
        async with self.http.stream("POST", "/v1/inference", json=asked) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("event: "):
                    kind = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    found.append((kind, json.loads(line.removeprefix("data: "))))
        return found


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def of(model: str) -> pytest.MarkDecorator:
    """Each test has a model of its own."""
    return pytest.mark.parametrize("rig", [model], indirect=True)


@pytest.fixture
async def rig(place: Place, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """The fleet of the model that the test names, as the fixture's parameter."""
    headers = {"Authorization": f"Bearer {place.key}"}
    limits = httpx.Limits(max_connections=None)
    async with (
        place.connected() as log,
        httpx.AsyncClient(base_url=place.url, headers=headers, timeout=WAIT_S, limits=limits) as http,
        anyio.create_task_group() as tasks,
    ):
        found = Rig(place, request.param, log, http)
        tasks.start_soon(found.fleet.run)
        tasks.start_soon(drive, log, found.fleet)
        yield found
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            for child in found.fleet.children:
                await child.stop(5)
