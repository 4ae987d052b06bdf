"""Rift's roles as separate commands, with a cluster of three nats-servers or a proxy to one."""

import json
import secrets
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import TaskGroup

from events import book as books
from events.contracts import MESSAGE_BYTES_MAX
from events.jetstream import JetStream, connect
from events.log import LogError
from rift import book_admin, catalogue, nats_server, price_lists, supervisor
from rift.data_dir import DataDir
from tests.chaos.proxy import Proxy
from tests.chaos.rig import POLL_S, READY_S, STOP_S, Rig, RigBroken, free_port

LOG_BYTES_MAX = 1 << 30
STREAMS = ("RIFT_0", "RIFT_FLEET", "RIFT_BOOK")

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


class Apart(Rig):
    """Nats-servers outside `rift up`, and each role by its own command."""

    servers = 1
    gateways = 1

    def __init__(self, folder: Path, *, engine: str, workers: int) -> None:
        super().__init__(folder, engine=engine, workers=workers)
        self._token = secrets.token_hex(16)
        self._names = [f"nats-{number}" for number in range(self.servers)]
        self._ports = {name: free_port() for name in self._names}
        self._monitors = {name: free_port() for name in self._names}
        self._routes = {name: free_port() for name in self._names}
        self._servers: dict[str, subprocess.Popen[bytes]] = {}
        self._children: list[supervisor.Child] = []

    async def start(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        supervisor.WELL_S = 0.0
        installation = DataDir(self.folder)
        installation.make()
        monitors = ",".join(f"http://127.0.0.1:{port}" for port in self._monitors.values())
        (self.folder / "rift.toml").write_text(
            f'fleet = "none"\nlog_replicas = {self.servers}\nlog_bytes_max = {LOG_BYTES_MAX}\n'
            f'nats_monitor = "{monitors}"\n'
        )
        for name in self._names:
            self._configure(name)
            await self.start_server(name)
        self.log = await self.connected()
        await self._prepare()
        await self._start_roles(list(self._ports.values()))
        await self.workers_ready()
        await self.settled()

    async def _prepare(self) -> None:
        """Create the streams and the book, as `rift up` does for its broker."""
        with anyio.move_on_after(READY_S):
            while True:
                try:
                    await self.log.ensure_streams(shards=1, replicas=self.servers, max_bytes=LOG_BYTES_MAX)
                    break
                except LogError:
                    await anyio.sleep(POLL_S)
        book = await books.read(self.log)
        await book_admin.open_account(self.log, book, "dev")
        published = price_lists.default(catalogue.shipped(), book)
        assert published is not None, "a new book has no prices"
        await book_admin.publish_prices(self.log, book, published)
        self.key = (await book_admin.issue_key(self.log, "dev")).text

    def screen(self) -> str:
        files = sorted((self.folder / "logs").glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text()[-2000:]}" for file in files)

    async def stop(self) -> list[str]:
        async with anyio.create_task_group() as tasks:
            for child in self._children:
                tasks.start_soon(child.stop, STOP_S)
        if hasattr(self, "log"):
            await self.log.close()
        for name in list(self._servers):
            self.kill_server(name)
        return [" ".join(command) for _, command in self.processes()]

    # --- roles ---------------------------------------------------------------------------------------

    async def _start_roles(self, nats_ports: Sequence[int]) -> None:
        """Start control, gateways and workers with the ports of all servers."""
        self._nats = ",".join(f"nats://{self._token}@127.0.0.1:{port}" for port in nats_ports)
        self._role("control", "control")
        for number in range(self.gateways):
            port = free_port()
            self._role(f"gateway-{number}", "gateway", "--port", str(port))
            self.urls.append(f"http://127.0.0.1:{port}")
        for number in range(self.workers):
            self._role(f"worker-{number}", "worker")
        for url in self.urls:
            await self.answering(url)

    def _role(self, name: str, role: str, *more: str) -> None:
        options = ["--data", str(self.folder), "--engine", self.engine, "--nats", self._nats]
        command = [sys.executable, "-m", "rift", role, *options, *more]
        self._children.append(self.child(name, command))

    async def sql(self, select: str) -> list[dict[str, Any]]:
        return await super().sql(select, "--nats", self._nats)

    async def connected(self) -> JetStream:
        urls = ",".join(f"nats://127.0.0.1:{port}" for port in self._ports.values())
        with anyio.move_on_after(READY_S):
            while True:
                with suppress(LogError):
                    return await connect(urls, token=self._token, name="chaos")
                await anyio.sleep(POLL_S)
        raise RigBroken("no server of the cluster answers")

    # --- servers -------------------------------------------------------------------------------------

    def _configure(self, name: str) -> None:
        routes = ", ".join(
            f'"nats://127.0.0.1:{port}"' for other, port in self._routes.items() if other != name
        )
        folder = self.folder / name
        folder.mkdir()
        configuration = CONFIGURATION + (IN_CLUSTER if self.servers > 1 else "")
        nats_server.write_secret(
            folder / "nats.conf",
            configuration.format(
                port=self._ports[name],
                monitor=self._monitors[name],
                name=name,
                max_payload=MESSAGE_BYTES_MAX,
                max_pending=nats_server.MAX_PENDING_BYTES,
                token=self._token,
                store=json.dumps(str(folder / "store")),
                route=self._routes[name],
                routes=routes,
            ),
        )

    async def start_server(self, name: str) -> None:
        with (self.folder / "logs" / f"{name}.log").open("ab") as output:
            self._servers[name] = subprocess.Popen(  # noqa: ASYNC220  # returns at once
                nats_server.command(self.folder / name), stdout=output, stderr=output, start_new_session=True
            )
        self.guard.add(self._servers[name].pid)

    def kill_server(self, name: str) -> None:
        self._servers[name].kill()
        self._servers[name].wait()


class Proxied(Apart):
    """One nats-server, which the roles reach through a proxy that loses acknowledgements."""

    gateways = 2

    async def start(self, tasks: TaskGroup) -> None:
        await super().start(tasks)
        assert self.proxy.port, "the roles were started behind the proxy"

    async def _start_roles(self, nats_ports: Sequence[int]) -> None:
        (upstream,) = nats_ports
        self.proxy = Proxy(upstream)
        await self.proxy.start(self._tasks)
        await super()._start_roles([self.proxy.port])


class Cluster(Apart):
    servers = 3

    async def leader(self) -> str:
        """Return the server that leads the shard's stream. Raises RigBroken."""
        with anyio.move_on_after(READY_S):
            while True:
                for info in await self._infos("RIFT_0"):
                    if leader := info.get("leader"):
                        return str(leader)
                await anyio.sleep(POLL_S)
        raise RigBroken("the stream has no leader")

    async def settled(self) -> None:
        """Return once every stream has a leader and two current followers."""
        with anyio.move_on_after(READY_S):
            while True:
                infos = await self._infos(*STREAMS)
                current = [all(peer.get("current") for peer in info.get("replicas", [])) for info in infos]
                if len(infos) == len(STREAMS) and all(current) and all(info.get("leader") for info in infos):
                    await super().settled()
                    return
                await anyio.sleep(POLL_S)
        raise RigBroken(f"the cluster did not recover: {infos}")

    async def _infos(self, *streams: str) -> list[dict[str, Any]]:
        clusters = []
        for stream in streams:
            try:
                reply = await self.log.client.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=2)
            except Exception:  # noqa: BLE001  # a cluster without a leader may answer anything
                continue
            if cluster := json.loads(reply.data).get("cluster"):
                clusters.append(cluster)
        return clusters
