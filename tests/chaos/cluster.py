"""Rift's roles as separate commands, with a cluster of three nats-servers or a proxy to one."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
from anyio.abc import TaskGroup

from events import book as books
from events import shards, subjects
from events.jetstream import JetStream
from rift import book_admin, catalogue, price_lists, supervisor
from rift.data_dir import DataDir
from tests.certificates import make
from tests.chaos.brokers import Brokers
from tests.chaos.proxy import Proxy
from tests.chaos.rig import POLL_S, READY_S, Rig, RigBroken, free_port

LOG_BYTES_MAX = 1 << 30


class Apart(Rig):
    """Nats-servers outside `rift up`, and each role by its own command."""

    servers = 1
    gateways = 1
    tls = False

    def __init__(self, folder: Path, *, engine: str, workers: int, shards: int = 1) -> None:
        super().__init__(folder, engine=engine, workers=workers, shards=shards)
        tls = self.folder / "tls" if self.tls else None
        self.brokers = Brokers(self.folder, self.servers, self.guard, tls=tls)
        self.environment |= self.brokers.environment

    async def start(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        supervisor.WELL_S = 0.0
        installation = DataDir(self.folder)
        installation.make()
        if self.brokers.tls is not None:
            make(self.brokers.tls)
        self.configure(
            'fleet = "none"',
            f"log_replicas = {self.servers}",
            f"log_bytes_max = {LOG_BYTES_MAX}",
            f'nats_monitor = "{",".join(self.brokers.monitors)}"',
        )
        self.brokers.start_all()
        self.log = await self.connected()
        await self._prepare()
        await self._start_roles(self.brokers.client_ports)
        await self.workers_ready()
        await self.settled()

    async def _prepare(self) -> None:
        """Create the streams and the book, as `rift up` does for its broker."""
        await self.brokers.ensure_streams(self.log, shards=self.shards, max_bytes=LOG_BYTES_MAX)
        await shards.open_up_to(self.log, self.shards, writer="chaos")
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
        await self.stop_children()
        if hasattr(self, "log"):
            await self.log.close()
        self.brokers.kill_all()
        return [" ".join(command) for _, command in self.processes()]

    # --- roles ---------------------------------------------------------------------------------------

    async def _start_roles(self, nats_ports: Sequence[int]) -> None:
        """Start control, gateways and workers with the ports of all servers."""
        self._nats = ",".join(f"nats://127.0.0.1:{port}" for port in nats_ports)
        self._role("control", "control")
        for number in range(max(self.gateways, self.shards)):
            port = free_port()
            shard = ["--shard", str(number % self.shards)] if self.shards > 1 else []
            self._role(f"gateway-{number}", "gateway", "--port", str(port), *shard)
            self.urls.append(f"http://127.0.0.1:{port}")
        for number in range(self.workers):
            self._role(f"worker-{number}", "worker")
        for url in self.urls:
            await self.answering(url)

    def _role(self, name: str, role: str, *more: str) -> None:
        options = ["--data", str(self.folder), "--engine", self.engine, "--nats", self._nats]
        command = [sys.executable, "-m", "rift", role, *options, *more]
        self.child(name, command)

    async def sql(self, select: str) -> list[dict[str, Any]]:
        return await super().sql(select, "--nats", self._nats)

    async def connected(self) -> JetStream:
        return await self.brokers.connected("chaos")


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
    """Three nats-servers, which speak TLS with one another and with Rift."""

    servers = 3
    tls = True

    async def leader(self, shard: int) -> str:
        """Return the server that leads a shard's stream. Raises RigBroken."""
        with anyio.move_on_after(READY_S):
            while True:
                for info in await self._infos(subjects.shard_stream(shard)):
                    if leader := info.get("leader"):
                        return str(leader)
                await anyio.sleep(POLL_S)
        raise RigBroken("the stream has no leader")

    async def settled(self) -> None:
        """Return once every stream has a leader and two current followers."""
        streams = (*subjects.folded(range(self.shards)),)
        with anyio.move_on_after(READY_S):
            while True:
                infos = await self._infos(*streams)
                current = [all(peer.get("current") for peer in info.get("replicas", [])) for info in infos]
                if len(infos) == len(streams) and all(current) and all(info.get("leader") for info in infos):
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
