"""Rift's roles as separate commands, at a cluster of three nats-servers, or at a proxy."""

import json
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
from tests.chaos.growing import Growing
from tests.chaos.proxy import Proxy
from tests.chaos.rig import POLL_S, READY_S, Hanging, Rig, RigBroken, TwoGateways

LOG_BYTES_MAX = 1 << 30


class Apart(Rig):
    """Nats-servers outside `rift up`, and each role by its own command."""

    tls = False

    def __init__(self, folder: Path, *, engine: str, workers: int, shards: int = 1) -> None:
        super().__init__(folder, engine=engine, workers=workers, shards=shards)
        tls = self.folder / "tls" if self.tls else None
        self.brokers = Brokers(self.folder, self.servers, self.guard, tls=tls)

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
        ports = await self._ports()
        self.nats = ",".join(f"nats://127.0.0.1:{port}" for port in ports)
        self.role("control", "control")
        for number in range(self.workers):
            self.role(f"worker-{number}", "worker")
        async with anyio.create_task_group() as starting:
            for shard in range(self.shards):
                named = ["--shard", str(shard)] if self.shards > 1 else []
                starting.start_soon(self.add_gateway, *named)
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

    async def connected(self) -> JetStream:
        return await self.brokers.connected("chaos")

    @property
    def broker_options(self) -> list[str]:
        return ["--nats", self.nats]

    def environment_of(self, command: str) -> dict[str, str]:
        return self.environment | self.brokers.environment(command)

    async def kill_server(self, victim: int, *, down_s: float) -> None:
        name = self.brokers.name_of(victim)
        self.brokers.kill(name)
        await anyio.sleep(down_s)
        self.brokers.start(name)

    async def _ports(self) -> Sequence[int]:
        """Return the ports at which the roles find the servers."""
        return self.brokers.client_ports


class Proxied(TwoGateways, Apart):
    """The roles reach the nats-servers through a proxy that loses acknowledgements."""

    async def _ports(self) -> Sequence[int]:
        self.proxy = Proxy(self.brokers.client_ports, tls=self.brokers.tls)
        await self.proxy.start(self._tasks)
        return self.proxy.ports


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


class TwoGatewaysCluster(TwoGateways, Cluster):
    pass


class GrowingCluster(Growing, Cluster):
    pass


class HangingCluster(Hanging, Cluster):
    pass


class ProxiedCluster(Proxied, Cluster):
    pass
