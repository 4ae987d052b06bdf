"""Refused requests are counted once each, whatever the log does, in reports of a bounded size."""

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest

from events import codec, subjects
from events.contracts import REFUSAL_COUNTS_MAX, REFUSALS_REPORT_S, SECOND_NS
from events.memory import Faults, MemoryBroker, MemoryLog
from events.schema import RefusalCount, RequestsRefused
from replay.facts import fold
from replay.facts.rows import RefusalRow
from replay.warehouse.warehouse import ProjectionStopped, Warehouse
from rift.gateway.exchange import Exchange
from rift.gateway.state import GatewayConfig
from rift.gateway.streams.own_lane import STORED_WITHIN_S
from rift.gateway.streams.refusals import RefusalCounts, RefusalReports
from tests.rift.gateway.admission.test_credit import World, live, opened
from tests.simulation import clock

START_NS = 1_800_000_000 * SECOND_NS
LANE = "laneaaaa"
CALM = Faults()
FAULTS = Faults(append_s=0.5, unanswered=0.3, lost=0.2, late=0.2, late_s=100.0, doubled=0.2, disconnects=0.1)


class Gateway:
    """The reports of a gateway, on a log whose clock jumps."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker
        config = GatewayConfig(
            lane=LANE, models={}, served=(), secret=b"s", entropy=random.Random(1).randbytes
        )
        self.reports = RefusalReports(MemoryLog(broker), config, broker.now_ns)

    def refuse(self, account: str | None = None, reason: str = "invalid_api_key", *, times: int = 1) -> None:
        for _ in range(times):
            self.reports.observe(Exchange(0, status=429, code=reason, account=account))
        self.reports.observe(Exchange(0, status=200, account=account))
        self.reports.observe(Exchange(0))

    def stored(self) -> list[RequestsRefused]:
        messages = self.broker.stream("RIFT_0").messages
        assert {message.subject for message in messages} <= {f"rift.0.lane.{LANE}"}
        return [event for message in messages for event in codec.decode(message.data)[1]]

    def counted(self) -> Counter[tuple[str | None, str]]:
        """Return the sums of relation `refusals`."""
        batch = fold.read("RIFT_0", self.broker.stream("RIFT_0").messages)
        sums: Counter[tuple[str | None, str]] = Counter()
        for row in fold.FactFold().apply(batch).rows:
            assert isinstance(row, RefusalRow)
            sums[row.account, row.reason] += row.count
        return sums


def during(test: Callable[[Gateway], Awaitable[None]], seed: int = 0, faults: Faults = CALM) -> None:
    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            broker = MemoryBroker(
                tasks,
                lambda: START_NS + int(anyio.current_time() * SECOND_NS),
                chance=random.Random(seed),
                faults=faults,
            )
            gateway = Gateway(broker)
            tasks.start_soon(gateway.reports.keep)
            await test(gateway)
            tasks.cancel_scope.cancel()

    clock.run(main, until_s=100_000.0)


def test_counts_are_bounded_and_the_rest_is_other() -> None:
    counts = RefusalCounts()
    for number in range(REFUSAL_COUNTS_MAX + 10):
        counts.add(f"a{number}", "queue_full")
    counts.add("a0", "queue_full")
    counts.add("a0", "log_full")
    told = counts.all()
    assert len(told) == REFUSAL_COUNTS_MAX
    assert told[0] == RefusalCount(account="a0", reason="queue_full", count=2)
    assert counts.other == 11
    # The schema has the same bound.
    report = RequestsRefused(lane="l", shard=0, from_at_ns=1, to_at_ns=2, counts=told, other=11)
    assert codec.decode(codec.encode("g", [report]))[1] == (report,)
    assert len(codec.encode("g", [report])) < 30_000


def test_a_report_a_minute_and_none_without_refusals() -> None:
    async def test(gateway: Gateway) -> None:
        await anyio.sleep(10 * REFUSALS_REPORT_S + 1)
        assert gateway.stored() == []
        gateway.refuse("acme", "queue_full", times=2)
        gateway.refuse()
        await anyio.sleep(REFUSALS_REPORT_S)
        (report,) = gateway.stored()
        assert report.to_at_ns - report.from_at_ns == REFUSALS_REPORT_S * SECOND_NS
        assert report.from_at_ns == START_NS + 10 * REFUSALS_REPORT_S * SECOND_NS
        assert report.counts == (
            RefusalCount(account="acme", reason="queue_full", count=2),
            RefusalCount(reason="invalid_api_key", count=1),
        )
        assert report.other == 0
        await anyio.sleep(10 * REFUSALS_REPORT_S)
        assert len(gateway.stored()) == 1

    during(test)


@pytest.mark.parametrize("fault", ["is_full", "is_unwritable"])
def test_an_outage_carries_the_counts_over(fault: str) -> None:
    async def test(gateway: Gateway) -> None:
        setattr(gateway.broker, fault, True)
        for minute in range(10):
            gateway.refuse("acme", f"reason-{minute}", times=2)
            await anyio.sleep(REFUSALS_REPORT_S)
        await anyio.sleep(1)
        assert gateway.stored() == []
        setattr(gateway.broker, fault, False)
        # A report is due within a minute, and is repeated for a while.
        await anyio.sleep(REFUSALS_REPORT_S + STORED_WITHIN_S)
        reports = gateway.stored()
        assert gateway.counted() == {("acme", f"reason-{minute}"): 2 for minute in range(10)}
        assert len({report.from_at_ns for report in reports}) == 2
        assert reports[-1].to_at_ns - reports[0].from_at_ns >= 10 * REFUSALS_REPORT_S * SECOND_NS

    during(test)


def test_what_is_left_is_reported_at_the_stop() -> None:
    async def test(gateway: Gateway) -> None:
        gateway.broker.is_full = True
        gateway.refuse(times=3)
        await anyio.sleep(REFUSALS_REPORT_S + 1)
        gateway.refuse("acme", "log_full")
        gateway.broker.is_full = False
        await gateway.reports.close()
        assert gateway.counted() == {(None, "invalid_api_key"): 3, ("acme", "log_full"): 1}
        gateway.broker.is_unwritable = True
        gateway.refuse()
        before_s = anyio.current_time()
        await gateway.reports.close()
        assert anyio.current_time() - before_s < 1.0

    during(test)


@pytest.mark.parametrize("seed", range(5))
def test_each_refusal_counts_once_on_a_bad_network(seed: int) -> None:
    async def test(gateway: Gateway) -> None:
        chance = random.Random(seed)
        told: Counter[Any] = Counter()
        for _ in range(300):
            pair = chance.choice((None, "acme")), chance.choice(("queue_full", "log_full"))
            gateway.refuse(*pair)
            told[pair] += 1
            await anyio.sleep(chance.uniform(0, 20))
        gateway.broker.faults = CALM
        await anyio.sleep(5 * REFUSALS_REPORT_S)
        assert gateway.counted() == told
        assert len({report.from_at_ns for report in gateway.stored()}) < len(gateway.stored())

    during(test, seed, FAULTS)


def test_a_report_of_a_newer_gateway_stops_the_projector_only() -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway()
        other = await world.gateway()
        await world.work()
        lane = subjects.lane(0, opened(other).lane.id)
        newer = b'{"version":1,"writer":"w","events":[{"type":"NewReport","lane":"x","shard":0}]}'
        world.broker.store("RIFT_0", lane, newer, None)
        for each in (gateway, other):
            status, _ = await world.answer(each)
            assert status == 200
        with closing(Warehouse.open(Path(":memory:"))) as warehouse:
            warehouse.apply(subjects.BOOK, world.broker.stream(subjects.BOOK).messages)
            with pytest.raises(ProjectionStopped, match="NewReport"):
                warehouse.apply("RIFT_0", world.broker.stream("RIFT_0").messages)

    live(test)
