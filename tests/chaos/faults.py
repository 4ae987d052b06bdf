"""The faults of a cycle, one function for each kind.

A fault happens at a token position of the cycle, drawn from the cycle's own chance. Its function returns once
the fault is over, which may be after the last client has its answer.
"""

import json
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import anyio

from events.log import APPEND_TIMEOUT_S
from tests.chaos.client import Client, Progress
from tests.chaos.cluster import (
    Cluster,
    GrowingCluster,
    HangingCluster,
    Proxied,
    ProxiedCluster,
    TwoGatewaysCluster,
)
from tests.chaos.growing import Growing
from tests.chaos.ledger import shard_streams
from tests.chaos.rig import Hanging, OnSmallDisk, Rig, TwoGateways

# A superseded attempt may still write for this long, until its engine's request is aborted.
ABORTED_S = 2.0
SECOND_NS = 1_000_000_000
# A request that ends its engines is attempted this many times.
DEATHS_MAX = 3


@dataclass
class Cycle:
    """One cycle's clients and the position of its fault. `woken_ns` is when a frozen worker continued."""

    rig: Rig
    clients: Sequence[Client]
    progress: Progress
    chance: random.Random
    tokens: int
    ended: anyio.Event = field(default_factory=anyio.Event)
    done: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    woken_ns: int | None = None

    def moments(self, count: int, *, since: float = 0.0, until: float = 0.9) -> list[int]:
        """Draw `count` token positions between the parts `since` and `until` of the cycle."""
        first = 1 + int(self.tokens * since)
        return sorted(self.chance.choices(range(first, max(first + 1, int(self.tokens * until))), k=count))

    async def reach(self, tokens: int) -> None:
        """Return once the clients have received `tokens`, or have all ended."""
        async with anyio.create_task_group() as tasks:

            async def all_ended() -> None:
                await self.ended.wait()
                tasks.cancel_scope.cancel()

            tasks.start_soon(all_ended)
            await self.progress.reach(tokens)
            tasks.cancel_scope.cancel()

    def note(self, fault: str) -> None:
        self.done.append(f"{fault} at token {self.progress.tokens}")


async def kill_worker(cycle: Cycle) -> None:
    for moment in cycle.moments(cycle.chance.choice((1, 1, 2))):
        await cycle.reach(moment)
        victim = cycle.chance.choice(await cycle.rig.alive("worker", 1))
        os.kill(victim, signal.SIGKILL)
        cycle.note("killed a worker")


async def open_shards(cycle: Cycle) -> None:
    """Open the other shards while workers are killed, once a cycle has run on the first one."""
    assert isinstance(cycle.rig, Growing), "only this installation begins with fewer shards"
    (moment,) = cycle.moments(1, until=0.2)
    await cycle.reach(moment)
    async with anyio.create_task_group() as tasks:
        if cycle.rig.may_grow:
            cycle.note("began to open shards")
            tasks.start_soon(cycle.rig.grow)
        await kill_worker(cycle)
    cycle.note(f"had {cycle.rig.shards} shards")


async def freeze_worker(cycle: Cycle) -> None:
    """Freeze a worker, in half of the cycles until all requests are answered without it.

    In the other half it continues once another worker has taken over, so that both write at once.
    """
    (moment,) = cycle.moments(1, until=0.5)
    await cycle.reach(moment)
    victim = cycle.chance.choice(await cycle.rig.alive("worker", cycle.rig.workers))
    before = taken_over(cycle.clients)
    os.kill(victim, signal.SIGSTOP)
    cycle.note("froze a worker")
    try:
        if cycle.chance.random() < 0.5:
            await cycle.ended.wait()
        while not cycle.ended.is_set() and taken_over(cycle.clients) == before:  # noqa: ASYNC110
            await anyio.sleep(0.002)
    finally:
        os.kill(victim, signal.SIGCONT)
    cycle.woken_ns = time.time_ns()
    cycle.note("woke it")
    await cycle.ended.wait()
    await anyio.sleep(max(0.0, ABORTED_S + 0.5 - (time.time_ns() - cycle.woken_ns) / SECOND_NS))


def taken_over(clients: Sequence[Client]) -> int:
    return sum(max(0, client.attempts - 1) for client in clients)


async def kill_broker(cycle: Cycle) -> None:
    """Kill a nats-server, or in a quarter of cases freeze it until appends time out and land late, and in a
    cluster at times until another server leads."""
    longest = 1.5 if cycle.rig.servers == 1 else 6.0
    for moment in cycle.moments(cycle.chance.choice((1, 1, 2))):
        await cycle.reach(moment)
        victim = cycle.chance.choice(await cycle.rig.alive("nats-server", cycle.rig.servers))
        if cycle.chance.random() < 0.25:
            os.kill(victim, signal.SIGSTOP)
            cycle.note("froze nats-server")
            await anyio.sleep(cycle.chance.uniform(0.5, longest) * APPEND_TIMEOUT_S)
            os.kill(victim, signal.SIGCONT)
            continue
        cycle.note("killed nats-server")
        await cycle.rig.kill_server(victim, down_s=cycle.chance.uniform(0.1, 3.0))


async def fill_disk(cycle: Cycle) -> None:
    """Fill the disk and free it again, in a third of cases with the broker killed meanwhile.

    In another third, the filler also takes the space of the released reserve.
    """
    assert isinstance(cycle.rig, OnSmallDisk), "only this disk may be filled"
    (moment,) = cycle.moments(1, until=0.5)
    await cycle.reach(moment)
    cycle.rig.disk.fill()
    cycle.note("filled the disk")
    how = cycle.chance.choice(("wait", "kill", "again"))
    if how == "kill":
        (victim,) = await cycle.rig.alive("nats-server", 1)
        os.kill(victim, signal.SIGKILL)
    await cycle.rig.fill_disk()
    if how == "again":
        cycle.rig.disk.fill()
    await anyio.sleep(cycle.chance.uniform(0.0, 3.0))
    cycle.rig.disk.free()
    cycle.note(f"freed it ({how})")


async def kill_gateway(cycle: Cycle) -> None:
    (moment,) = cycle.moments(1)
    await cycle.reach(moment)
    victim = cycle.chance.choice(await cycle.rig.alive("gateway", 2))
    os.kill(victim, signal.SIGKILL)
    cycle.note("killed a gateway")


async def kill_leader(cycle: Cycle) -> None:
    """Kill the server that leads a shard, and in some cycles also a process, which starts while the others
    elect."""
    assert isinstance(cycle.rig, Cluster), "only a cluster has a leader to lose"
    (moment,) = cycle.moments(1)
    await cycle.reach(moment)
    server = await cycle.rig.leader(cycle.chance.randrange(cycle.rig.shards))
    cycle.rig.brokers.kill(server)
    cycle.note(f"killed the leader {server}")
    if role := cycle.chance.choice(("", "worker", "control")):
        os.kill(cycle.chance.choice(await cycle.rig.alive(role, 1)), signal.SIGKILL)
        cycle.note(f"killed a {role} process")
    await anyio.sleep(cycle.chance.uniform(0.1, 3.0))
    cycle.rig.brokers.start(server)


async def drain(cycle: Cycle) -> None:
    """Ask a worker or a gateway to end, so that its requests move to another.

    The moment is one at which each of them has requests: not among the first streams, nor the last.
    """
    (moment,) = cycle.moments(1, since=0.1, until=0.6)
    await cycle.reach(moment)
    role = cycle.chance.choice(("worker", "gateway"))
    victim = cycle.chance.choice(await cycle.rig.alive(role, 2))
    os.kill(victim, signal.SIGTERM)
    cycle.note(f"drained a {role}")


async def drop_acks(cycle: Cycle) -> None:
    assert isinstance(cycle.rig, Proxied), "only a proxy drops acknowledgements"
    cycle.rig.proxy.drop(cycle.chance)
    await cycle.ended.wait()
    cycle.note(f"dropped {cycle.rig.proxy.stop_dropping()} acknowledgements")


async def poison(cycle: Cycle) -> None:
    """End every engine that starts the fatal request, until no worker starts it any more."""
    (fatal,) = (client.plan.prompt for client in cycle.clients if client.plan.fatal)
    log = cycle.rig.log
    deaths = 0
    async with anyio.create_task_group() as tasks:

        async def all_ended() -> None:
            await cycle.ended.wait()
            tasks.cancel_scope.cancel()

        async def crash(stream: str, everything: str, last: int) -> None:
            nonlocal deaths
            request = None
            async with log.follow(stream, [everything], after=last) as reader:
                async for batch in reader:
                    for stored in batch:
                        events = json.loads(stored.data)["events"]
                        if events[0].get("input") == fatal:
                            request = events[0]["request"]
                        mine = [event for event in events if event.get("request") == request]
                        # A start and an end in one record: an attempt that no engine saw.
                        if [event["type"] for event in mine] == ["AttemptStarted"]:
                            cycle.rig.crash(mine[0]["worker"])
                            deaths += 1

        tasks.start_soon(all_ended)
        for stream, everything in await shard_streams(log):
            tasks.start_soon(crash, stream, everything, await log.last_sequence(stream))
    cycle.note(f"ended {deaths} engines")
    if deaths > DEATHS_MAX:
        cycle.problems.append(f"{deaths} engines died of one request, at most {DEATHS_MAX} may")


async def hang(cycle: Cycle) -> None:
    """Let one engine hang until its worker has noticed and ended."""
    assert isinstance(cycle.rig, Hanging), "only this worker's engine can hang"
    (moment,) = cycle.moments(1, until=0.5)
    await cycle.reach(moment)
    victim = cycle.rig.victim()
    cycle.rig.flag.touch()
    cycle.note("an engine hung")
    while victim in cycle.rig.pids("worker"):  # noqa: ASYNC110  # another process
        await anyio.sleep(0.05)
    cycle.rig.flag.unlink()
    await cycle.rig.workers_ready()


class Kind(NamedTuple):
    """`healed`: the fault may break off or refuse clients, as long as a retry heals it.

    `cluster` is the rig with three nats-servers, None if the fault is about `rift up` itself. `keys`: most
    clients have an idempotency key. `fatal`: one request ends its engines.
    """

    rig: type[Rig]
    cluster: type[Cluster] | None
    workers: int
    fault: Callable[[Cycle], Awaitable[None]]
    healed: bool = False
    keys: bool = False
    fatal: bool = False


KINDS = {
    "worker": Kind(Rig, Cluster, 3, kill_worker),
    "grow": Kind(Growing, GrowingCluster, 3, open_shards),
    "zombie": Kind(Rig, Cluster, 3, freeze_worker),
    "broker": Kind(Rig, Cluster, 2, kill_broker, healed=True),
    "disk": Kind(OnSmallDisk, None, 2, fill_disk, healed=True, keys=True),
    "cluster": Kind(Cluster, Cluster, 2, kill_leader, healed=True),
    "gateway": Kind(TwoGateways, TwoGatewaysCluster, 2, kill_gateway, healed=True, keys=True),
    "drain": Kind(TwoGateways, TwoGatewaysCluster, 2, drain, healed=True, keys=True),
    "acks": Kind(Proxied, ProxiedCluster, 2, drop_acks, healed=True, keys=True),
    "poison": Kind(Rig, Cluster, 4, poison, fatal=True),
    "hang": Kind(Hanging, HangingCluster, 2, hang),
}
