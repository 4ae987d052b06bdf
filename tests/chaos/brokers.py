"""Real nats-servers on loopback: one, or a cluster of several that route to each other."""

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import anyio

from events.jetstream import JetStream, connect
from events.log import LogError
from events.subjects import slug
from rift import catalogue, nats_server
from rift.broker import credentials, roles
from rift.broker.configuration import AUTHORIZATION, Routes, Server, authorization
from rift.broker.secret_files import write_secret
from rift.nats_server import Address
from rift.supervisor import Guard
from tests.chaos.expected import MODEL
from tests.chaos.rig import POLL_S, READY_S, RigBroken, free_port

# The most that a server stores.
FILE_BYTES = 8 << 30

# The passwords that a command of Rift has, if they are not the operator's alone.
PASSWORDS = {
    "control": (roles.CONTROL, roles.READER),
    "gateway": (roles.GATEWAY,),
    "worker": (roles.worker(slug(MODEL)),),
    "shards": (roles.OPERATOR, roles.CONTROL),
}


class Ports(NamedTuple):
    client: int
    monitor: int
    route: int


class Brokers:
    """Servers `nats-0`, `nats-1`, … in folders of their own, which know Rift's roles.

    `tls` is a folder with their certificate. `guard` kills them if this process dies.
    """

    def __init__(self, folder: Path, count: int, guard: Guard, *, tls: Path | None = None) -> None:
        self.credentials = folder / "credentials"
        self.tls = tls
        self.ports = {
            f"nats-{number}": Ports(free_port(), free_port(), free_port()) for number in range(count)
        }
        self._folder, self._guard = folder, guard
        self._servers: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def address(self) -> Address:
        return Address(self.urls, credentials=self.credentials, tls=self.tls)

    def environment(self, command: str) -> dict[str, str]:
        """Return what `rift COMMAND` needs besides the URL: its own passwords, and no other."""
        folder = self._folder / "passwords" / command
        if not folder.exists():
            folder.mkdir(parents=True)
            for name in PASSWORDS.get(command, (roles.OPERATOR,)):
                shutil.copy(self.credentials / name, folder)
        tls = {} if self.tls is None else {"RIFT_NATS_TLS": str(self._ca)}
        return {"RIFT_NATS_CREDENTIALS": str(folder), **tls}

    @property
    def _ca(self) -> Path:
        """Return a folder with the authority's certificate alone, which is all that a client needs."""
        assert self.tls is not None, "only with TLS"
        folder = self._folder / "ca"
        if not folder.exists():
            folder.mkdir()
            shutil.copy(self.tls / "ca.pem", folder)
        return folder

    @property
    def client_ports(self) -> list[int]:
        return [ports.client for ports in self.ports.values()]

    @property
    def urls(self) -> str:
        return ",".join(f"nats://127.0.0.1:{port}" for port in self.client_ports)

    @property
    def monitors(self) -> list[str]:
        return [f"http://127.0.0.1:{ports.monitor}" for ports in self.ports.values()]

    @property
    def pids(self) -> list[int]:
        return [server.pid for server in self._servers.values()]

    def start_all(self) -> None:
        """Configure and start every server."""
        for name in self.ports:
            self._configure(name)
            self.start(name)

    def start(self, name: str) -> None:
        logs = self._folder / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{name}.log").open("ab") as output:
            self._servers[name] = subprocess.Popen(
                nats_server.command(self._folder / name), stdout=output, stderr=output, start_new_session=True
            )
        self._guard.add(self._servers[name].pid)

    def kill(self, name: str) -> None:
        server = self._servers[name]
        server.kill()
        server.wait()
        self._guard.ended(server.pid)

    def name_of(self, pid: int) -> str:
        (name,) = [name for name, server in self._servers.items() if server.pid == pid]
        return name

    def kill_all(self) -> None:
        for name in self._servers:
            self.kill(name)

    async def connected(self, name: str) -> JetStream:
        """Connect under this name as soon as a server answers. Raises RigBroken."""
        with anyio.move_on_after(READY_S):
            while True:
                with suppress(LogError):
                    return await connect(self.urls, self.address.access(roles.ADMIN), name=name)
                await anyio.sleep(POLL_S)
        raise RigBroken("no nats-server answers")

    async def ensure_streams(self, log: JetStream, *, shards: int, max_bytes: int) -> None:
        """Create the streams, on every server, once the servers have found each other."""
        with anyio.move_on_after(READY_S):
            while True:
                with suppress(LogError):
                    await log.ensure_streams(shards=shards, replicas=len(self.ports), max_bytes=max_bytes)
                    return
                await anyio.sleep(POLL_S)
        raise RigBroken("the streams could not be created")

    def _configure(self, name: str) -> None:
        own = self.ports[name]
        routes = [f"127.0.0.1:{ports.route}" for other, ports in self.ports.items() if other != name]
        folder = self._folder / name
        folder.mkdir()
        server = Server(
            name=name,
            listen=f"127.0.0.1:{own.client}",
            monitor=f"127.0.0.1:{own.monitor}",
            store=str(folder / "store"),
            file_bytes=FILE_BYTES,
            tls="" if self.tls is None else str(self.tls),
            routes=Routes(f"127.0.0.1:{own.route}", routes, "chaos-cluster") if routes else None,
        )
        granted = roles.table(map(slug, catalogue.shipped()))
        passwords = credentials.ensure(self.credentials, granted)
        write_secret(folder / AUTHORIZATION, authorization(granted, passwords))
        write_secret(folder / "nats.conf", server.text())
