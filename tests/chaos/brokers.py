"""Real nats-servers on loopback: one, or a cluster of several that route to each other."""

import json
import secrets
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import anyio

from events.contracts import MESSAGE_BYTES_MAX
from events.jetstream import Access, JetStream, connect
from events.log import LogError
from rift import nats_server
from rift.broker.configuration import MAX_PENDING_BYTES
from rift.broker.secret_files import write_secret
from rift.supervisor import Guard
from tests.chaos.rig import POLL_S, READY_S, RigBroken, free_port

CONFIGURATION = """\
listen: "127.0.0.1:{port}"
http: "127.0.0.1:{monitor}"
server_name: {name}
max_payload: {max_payload}
max_pending: {max_pending}
authorization {{ token: "{token}" }}
jetstream {{
  store_dir: {store}
  sync_interval: always
}}
"""
IN_CLUSTER = """\
cluster {{
  name: chaos
  listen: "127.0.0.1:{route}"
  routes: [{routes}]
}}
"""


class Ports(NamedTuple):
    client: int
    monitor: int
    route: int


class Brokers:
    """Servers `nats-0`, `nats-1`, … in folders of their own. `guard` kills them if this process dies."""

    def __init__(self, folder: Path, count: int, guard: Guard) -> None:
        self.token = secrets.token_hex(16)
        self.ports = {
            f"nats-{number}": Ports(free_port(), free_port(), free_port()) for number in range(count)
        }
        self._folder, self._guard = folder, guard
        self._servers: dict[str, subprocess.Popen[bytes]] = {}

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

    def kill_all(self) -> None:
        for name in self._servers:
            self.kill(name)

    async def connected(self, name: str) -> JetStream:
        """Connect under this name as soon as a server answers. Raises RigBroken."""
        with anyio.move_on_after(READY_S):
            while True:
                with suppress(LogError):
                    return await connect(self.urls, Access(token=self.token), name=name)
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
        routes = ", ".join(
            f'"nats://127.0.0.1:{ports.route}"' for other, ports in self.ports.items() if other != name
        )
        folder = self._folder / name
        folder.mkdir()
        configuration = CONFIGURATION + (IN_CLUSTER if routes else "")
        write_secret(
            folder / "nats.conf",
            configuration.format(
                port=own.client,
                monitor=own.monitor,
                name=name,
                max_payload=MESSAGE_BYTES_MAX,
                max_pending=MAX_PENDING_BYTES,
                token=self.token,
                store=json.dumps(str(folder / "store")),
                route=own.route,
                routes=routes,
            ),
        )
