"""Which shard a gateway takes, and which gateways it counts."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import anyio
import msgspec
import pytest

from events import shards, subjects
from events.fleet import Fleet, Replica
from events.memory import MemoryBroker, MemoryLog
from events.publisher import Publisher
from events.schema import LaneLost, LaneOpened, ReplicaReady, ReplicaReported, ReplicaStarting
from rift.gateway.streams import shard_choice
from rift.gateway.streams.live_gateways import LiveGateways
from rift.rpc import AskShards
from tests.simulation import clock

pytestmark = pytest.mark.anyio


def chosen(
    named: int | None,
    *,
    supervised: Sequence[int] | None,
    workers: int = 3,
    stop_s: float = 60.0,
    requests_from: int = 0,
) -> tuple[int | None, float]:
    """Return the shard that a gateway takes of three, and when. `supervised` are the gateways of each shard
    that the leader supervises, None if none leads; a worker serves `workers` shards after 4 s, one before.
    The gateway is stopped after `stop_s`."""
    found: list[int | None] = []
    at_s: list[float] = []
    stop = anyio.Event()

    async def main() -> None:
        async with anyio.create_task_group() as tasks, AsyncExitStack() as stack:
            broker = MemoryBroker(tasks, lambda: int(anyio.current_time() * 1e9), shards=3)
            log = MemoryLog(broker)
            await shards.open_up_to(log, 3, writer="test", requests_from=requests_from)
            publisher = Publisher(log, "w")
            for event in (
                ReplicaStarting(replica="r", model="m", engine="sim"),
                ReplicaReady(replica="r", model="m", slots=1, start_ns=1),
            ):
                await publisher.publish(event, within_s=1)

            async def report() -> None:
                await anyio.sleep(4)
                reported = ReplicaReported(replica="r", model="m", running=0, waiting=0, shards=workers)
                await publisher.publish(reported, within_s=1)

            async def answer(data: bytes) -> bytes:
                rows = [{"shard": n, "gateways": many} for n, many in enumerate(supervised or ())]
                return msgspec.json.encode({"answer": rows})

            tasks.start_soon(report)
            if supervised is not None:
                await stack.enter_async_context(log.answer(AskShards.topic, answer))
            asyncio.get_running_loop().call_later(stop_s, stop.set)
            found.append(await shard_choice.choose(log, named, lambda: 0.5, stop))
            at_s.append(anyio.current_time())
            tasks.cancel_scope.cancel()

    clock.run(main)
    return found[0], at_s[0]


def test_a_named_shard_is_used_once_leader_and_workers_serve_it(caplog: pytest.LogCaptureFixture) -> None:
    shard, at_s = chosen(2, supervised=[1, 1, 1])
    assert shard == 2
    assert at_s > 4
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("supervised", [None, [0, 3, 3]])
def test_no_gateway_takes_a_shard_from_before_a_restore(supervised: Sequence[int] | None) -> None:
    assert chosen(None, supervised=supervised, requests_from=1)[0] == 1
    assert chosen(None, supervised=supervised, requests_from=2)[0] == 2
    with pytest.raises(ExceptionGroup) as failed:
        chosen(1, supervised=supervised, requests_from=2)
    assert failed.group_contains(shard_choice.ShardUnknown, match="shard 1 accepts no requests .* from 2 on")


def test_a_gateway_that_waits_says_so_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    assert chosen(2, supervised=None, stop_s=100) == (None, pytest.approx(100, abs=0.1))
    assert [message.partition(" that ")[0][:20] for message in caplog.messages] == [
        "the leader does not tell"[:20],
        "this gateway waits until"[:20],
    ] * 2


def test_a_gateway_that_waits_for_its_shard_can_be_stopped() -> None:
    assert chosen(2, supervised=[1, 1, 1], stop_s=2) == (None, pytest.approx(2, abs=0.1))


def test_without_a_name_it_takes_a_served_shard_at_once() -> None:
    assert chosen(None, supervised=[5, 0, 0]) == (0, pytest.approx(0, abs=1))


def test_without_a_leader_it_takes_the_first_shard() -> None:
    assert chosen(None, supervised=None)[0] == 0
    assert chosen(0, supervised=None)[0] == 0


def test_a_shard_that_does_not_exist_is_named() -> None:
    with pytest.raises(ExceptionGroup) as failed:
        chosen(3, supervised=[0, 0, 0])
    assert failed.group_contains(shard_choice.ShardUnknown, match=r"no shard 3: the log has 3, .*shards add")


def test_the_least_busy_served_shard_is_taken() -> None:
    def fleet(*served: int) -> Fleet:
        fleet = Fleet()
        for n, many in enumerate(served):
            fleet.replicas.setdefault(f"model-{n}", {})["r"] = Replica("ready", 0, 0, 1, shards=many)
        return fleet

    assert shard_choice.has_workers(fleet(3, 2), 1)
    assert not shard_choice.has_workers(fleet(3, 2), 2)
    assert shard_choice.has_workers(fleet(), 7), "a model that has no replica starts them with every shard"


def test_gateways_are_counted_over_all_shards_and_those_of_the_own_one_apart() -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            broker = MemoryBroker(tasks, lambda: int(anyio.current_time() * 1e9), shards=2)
            log = MemoryLog(broker)
            gateways = LiveGateways(0, "lane-a")
            tasks.start_soon(gateways.follow, log)
            await anyio.sleep(0.1)
            await Publisher(log, "b").publish(LaneOpened(lane="lane-b", shard=0), within_s=1)
            await anyio.sleep(0.1)
            assert (len(gateways), gateways.on_own_shard()) == (2, 2)
            await shards.open_up_to(log, 2, writer="test")
            await anyio.sleep(0.1)
            other = Publisher(log, "c", shard=1)
            await other.publish(LaneOpened(lane="lane-c", shard=1), within_s=1)
            await anyio.sleep(0.1)
            assert (len(gateways), gateways.on_own_shard()) == (3, 2)
            await other.publish(LaneLost(lane="lane-c"), within_s=1)
            await anyio.sleep(0.1)
            assert len(gateways) == 2
            await anyio.sleep(60)
            assert len(gateways) == 1, "silent ones are not counted"
            tasks.cancel_scope.cancel()

    clock.run(main)


def test_a_shard_that_does_not_answer_costs_only_its_own_gateways() -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            broker = MemoryBroker(tasks, lambda: int(anyio.current_time() * 1e9), shards=1)
            log = MemoryLog(broker)
            await shards.open_up_to(log, 2, writer="test")
            assert subjects.shard_stream(1) not in broker.streams
            gateways = LiveGateways(0, "lane-a")
            tasks.start_soon(gateways.follow, log)
            await anyio.sleep(0.1)
            await Publisher(log, "b").publish(LaneOpened(lane="lane-b", shard=0), within_s=1)
            await anyio.sleep(0.1)
            assert len(gateways) == 2
            tasks.cancel_scope.cancel()

    clock.run(main)


def test_a_record_that_cannot_be_read_does_not_end_the_gateways_of_all_shards() -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            broker = MemoryBroker(tasks, lambda: int(anyio.current_time() * 1e9), shards=1)
            log = MemoryLog(broker)
            gateways = LiveGateways(0, "lane-a")
            tasks.start_soon(gateways.follow, log)
            await anyio.sleep(0.1)
            await log.append(subjects.shard_stream(0), subjects.lane(0, "lane-b"), b"{")
            await anyio.sleep(10)
            await Publisher(log, "b").publish(LaneOpened(lane="lane-b", shard=0), within_s=1)
            await anyio.sleep(0.1)
            assert len(gateways) == 2
            tasks.cancel_scope.cancel()

    clock.run(main)
