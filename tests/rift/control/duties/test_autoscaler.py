"""The leader decides from the log with a reason, and each decision can be reproduced from the log."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from events import codec, fleet, memory, shards, subjects
from events.memory import MemoryBroker
from events.schema import (
    ControlElected,
    ReplicaLost,
    ReplicaReady,
    ReplicaReported,
    ReplicaStarting,
    RequestFinished,
    ScaleDecided,
    ScalePlanned,
)
from events.subjects import Address
from replay.archive.archive import Archive
from replay.scaling import policy as decide
from replay.scaling import verify
from replay.scaling.demand import PASTS, Demand, Replicas
from replay.scaling.policy import Policy
from replay.warehouse.warehouse import Warehouse
from rift.control import process
from rift.control.config import ControlConfig
from rift.control.duties import autoscaler, replica_reports
from rift.control.projection.warehouse_host import Projection
from rift.control.scaling_config import UNKNOWN, ModelScaling
from tests.replay.asked import ask_sql

pytestmark = pytest.mark.anyio

MODEL, AT = "tiny:1", Address(0, "laneaaaa", "tiny-1")
SECOND = 1_000_000_000


class World:
    """Control on a log in memory whose clock is the test's: `ahead_ns` on top of the real one."""

    def __init__(self, tasks: Any, scribe: Any, folder: Path) -> None:
        self.scribe, self.folder = scribe, folder
        self.ahead_ns = 0
        began = anyio.current_time()
        start_ns = scribe.now_ns

        def now_ns() -> int:
            return start_ns + self.ahead_ns + int((anyio.current_time() - began) * 1e9)

        self.broker = MemoryBroker(tasks, now_ns)
        for stream, messages in scribe.streams.items():
            for stored in messages:
                self.broker.streams[stream].add(stored.subject, stored.data, stored.stored_at_ns)
        self.log = memory.connect(self.broker)

    @asynccontextmanager
    async def controlling(self, scaling: dict[str, ModelScaling], *, db: str = "db") -> AsyncIterator[None]:
        stop = anyio.Event()
        archive = Archive(self.folder / "archive", key=b"k" * 32)
        async with anyio.create_task_group() as tasks:

            async def run() -> None:
                config = ControlConfig(scaling=scaling)
                await process.run(self.log, self.folder / db, archive, config, stop=stop)

            tasks.start_soon(run)
            try:
                yield
            finally:
                stop.set()

    async def say(self, *events: Any, to: str = "fleet") -> None:
        if to == "fleet":
            where = subjects.FLEET, subjects.fleet(AT.model)
        else:
            where = "RIFT_0", subjects.request(AT) if to == "request" else subjects.work(AT)
        await self.log.append(*where, codec.encode("test", events))

    async def ask(self, **fields: Any) -> str:
        request = self.scribe.request_id()
        await self.say(self.scribe.accepted(request, **fields), to="request")
        return request

    async def finish(self, request: str) -> None:
        attempt = self.scribe.unique("att")
        await self.say(self.scribe.started(request, attempt), to="work")
        end = RequestFinished(request=request, attempt=attempt, reason="stop", output_tokens=0)
        await self.say(end, to="work")

    async def fleet(self) -> fleet.Fleet:
        return await fleet.read(self.log)

    async def wants(self, replicas: int) -> ScaleDecided:
        with anyio.fail_after(10):
            while (found := await self.fleet()).wanted.get(MODEL) != replicas:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        return found.decided[MODEL]

    def replay(self) -> list[str]:
        """Fold the whole log into a fresh file, and return what does not come out again."""
        warehouse = Warehouse.open(self.folder / f"again-{len(list(self.folder.iterdir()))}")
        try:
            for stream in (subjects.BOOK, subjects.FLEET, "RIFT_0"):
                warehouse.apply(stream, list(self.broker.stream(stream).messages))
            return list(verify.differences(warehouse))
        finally:
            warehouse.close()


@pytest.fixture
async def world(scribe: Any, tmp_path: Path) -> AsyncIterator[World]:
    scribe.prices()
    async with anyio.create_task_group() as tasks:
        yield World(tasks, scribe, tmp_path)
        tasks.cancel_scope.cancel()


def served(**policy: Any) -> dict[str, ModelScaling]:
    return {MODEL: ModelScaling(Policy(**policy), UNKNOWN)}


async def test_a_request_for_a_model_at_zero_decides_at_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoscaler, "TICK_S", 1000)
    world.broker.add_shard()
    await shards.open_up_to(world.log, 2, writer="test")
    async with world.controlling(served(replicas_max=3)):
        await ask_until_answered(world)
        await world.ask()
        decided = await world.wants(1)
        assert "1 waiting" in decided.reason
        assert decided.epoch == 1
        assert decided.inputs["demand.waiting"] == 1
        assert decided.inputs["policy.replicas_max"] == 3
        assert decided.positions.keys() == {"RIFT_0", "RIFT_1", "RIFT_FLEET"}
        assert decided.positions["RIFT_1"] == 0
        (row,) = (await ask_sql(world.log, "select reason, counts, inputs from decisions")).rows
        assert row[:2] == [decided.reason, True]
        assert json.loads(row[2]) == decided.inputs
    assert world.replay() == []


async def ask_until_answered(world: World) -> None:
    with anyio.fail_after(10):
        while not (await world.fleet()).epoch:  # noqa: ASYNC110
            await anyio.sleep(0.01)
    await anyio.sleep(0.2)


async def test_a_model_scales_to_its_minimum_and_to_zero_when_it_is_no_longer_served(
    world: World,
) -> None:
    async with world.controlling(served(replicas_min=2, replicas_max=2)):
        assert "minimum" in (await world.wants(2)).reason
    async with world.controlling({}):
        await anyio.sleep(1)
        assert (await world.fleet()).wanted[MODEL] == 2, "where none is served, nothing is decided"
    async with world.controlling({"other:1": ModelScaling(Policy(), UNKNOWN)}):
        await world.wants(0)
    assert world.replay() == []


async def test_an_idle_model_scales_to_zero(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaler, "TICK_S", 0.05)
    async with world.controlling(served(idle_ns=300 * SECOND)):
        request = await world.ask()
        await world.wants(1)
        await world.say(ReplicaStarting(replica="r", model=MODEL, engine="sim"))
        await world.say(ReplicaReady(replica="r", model=MODEL, slots=4, start_ns=SECOND))
        await world.finish(request)
        await anyio.sleep(0.3)
        assert (await world.fleet()).wanted[MODEL] == 1
        world.ahead_ns += 301 * SECOND
        await world.say(ReplicaReported(replica="r", model=MODEL, running=0, waiting=0))
        assert "nothing was under way for 301 s" in (await world.wants(0)).reason
    assert world.replay() == []


async def test_a_silent_replica_is_declared_lost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaler, "TICK_S", 0.05)
    monkeypatch.setattr(replica_reports, "SILENT_S", 1.5)
    async with world.controlling(served(replicas_min=1, replicas_max=1)):
        await world.wants(1)
        for name in ("heard", "silent"):
            await world.say(ReplicaStarting(replica=name, model=MODEL, engine="sim"))
        # The broker's clock may jump: silence is heard by our own.
        world.ahead_ns += 3600 * SECOND
        await anyio.sleep(0.3)
        assert len((await world.fleet()).replicas[MODEL]) == 2
        with anyio.fail_after(10):
            while "silent" in (await world.fleet()).replicas[MODEL]:
                await world.say(ReplicaReported(replica="heard", model=MODEL, running=0, waiting=0))
                await anyio.sleep(0.1)
        assert "heard" in (await world.fleet()).replicas[MODEL]
        (why,) = (await ask_sql(world.log, "select why from replicas where state = 'lost'")).rows[0]
        assert why.startswith("silent for 1")
    assert world.replay() == []


async def test_nothing_is_decided_while_the_projection_is_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fleet's stream is short, and projected long before a shard is: work not seen yet is not no work."""
    monkeypatch.setattr(autoscaler, "TICK_S", 0.05)
    await world.say(ReplicaStarting(replica="r", model=MODEL, engine="sim"))
    await world.ask()
    behind = True

    async def catch_up(projection: Projection) -> bool:
        return not behind

    monkeypatch.setattr(Projection, "catch_up", catch_up)
    async with world.controlling(served(replicas_max=3)):
        await ask_until_answered(world)
        await anyio.sleep(0.3)
        assert MODEL not in (await world.fleet()).wanted
        behind = False
        assert (await world.wants(1)).inputs["demand.waiting"] == 1


async def test_silence_before_the_election_does_not_count(world: World) -> None:
    world.scribe.now_ns -= 3600 * SECOND
    await world.say(ReplicaStarting(replica="r", model=MODEL, engine="sim"))
    world.ahead_ns += 3600 * SECOND
    async with world.controlling(served(replicas_min=1, replicas_max=1)):
        await world.wants(1)
        await anyio.sleep(0.5)
        assert "r" in (await world.fleet()).replicas[MODEL]


async def test_a_deposed_leader_decides_nothing(world: World) -> None:
    async with world.controlling(served(replicas_max=3)):
        await ask_until_answered(world)
        other = codec.encode("other", [ControlElected(epoch=2, control="other")])
        await world.log.append(subjects.FLEET, subjects.LEADER, other)
        await world.ask()
        # The other leader does not answer, so this one stands again.
        assert (await world.wants(1)).epoch == 3
    messages = world.broker.stream(subjects.FLEET).messages
    events = [event for stored in messages for event in codec.decode(stored.data)[1]]
    assert [event.epoch for event in events if isinstance(event, ScaleDecided)] == [3]


async def test_verification_finds_each_difference(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.controlling(served(replicas_max=3)):
        await world.ask()
        decided = await world.wants(1)
    assert world.replay() == []
    # Another number, another reason, another input, another policy: each is named.
    stream = world.broker.stream(subjects.FLEET)
    at = next(i for i, stored in enumerate(stream.messages) if b"ScaleDecided" in stored.data)
    honest = stream.messages[at]
    for changed, found in (
        ({"to_replicas": 2}, "it was 2"),
        ({"reason": "because"}, "because"),
        ({"inputs": decided.inputs | {"demand.waiting": 7}}, "demand.waiting was 7, and is 1"),
        ({"inputs": {}}, "not those of policy"),
        ({"positions": {"RIFT_0": 0, "RIFT_FLEET": 1}}, "demand.waiting was 1, and is 0"),
    ):
        event = ScaleDecided(**{name: getattr(decided, name) for name in decided.__struct_fields__} | changed)
        data = codec.encode("autoscaler", [event])
        stream.messages[at] = type(honest)(honest.subject, honest.sequence, honest.stored_at_ns, data)
        (line,) = world.replay()
        assert found in line
        assert line.startswith("decision RIFT_FLEET:")
    stream.messages[at] = honest
    # And a decide that decides otherwise.
    monkeypatch.setattr(verify, "decide", lambda *inputs: decide.Decision(9, "nine"))
    (line,) = world.replay()
    assert "Decision(to_replicas=9" in line


async def test_trimmed_records_still_count(world: World) -> None:
    """The facts hold how long starts take, so a leader that begins after a trim decides the same."""
    async with world.controlling(served(replicas_max=3)):
        await world.say(ReplicaStarting(replica="old", model=MODEL, engine="sim"))
        await world.say(ReplicaReady(replica="old", model=MODEL, slots=4, start_ns=7 * SECOND))
        await world.say(ReplicaLost(replica="old", model=MODEL))
        await ask_until_answered(world)
    last = await world.log.last_sequence(subjects.FLEET)
    whole = list(world.broker.stream(subjects.FLEET).messages)
    await world.log.trim(subjects.FLEET, last)
    async with world.controlling(served(replicas_max=3)):
        await world.ask()
        assert (await world.wants(1)).inputs["replicas.start_ns"] == 7 * SECOND
    stream = world.broker.stream(subjects.FLEET)
    kept = {stored.sequence for stored in stream.messages}
    stream.messages[:0] = [stored for stored in whole if stored.sequence not in kept]
    assert world.replay() == []


async def test_a_replay_of_the_past_holds_a_floor_that_can_be_computed_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 prompts of an unknown length at once: one replica would fill them for three seconds."""
    monkeypatch.setattr(autoscaler, "TICK_S", 0.05)
    stream = world.broker.stream(subjects.FLEET)

    def plans() -> list[ScalePlanned]:
        events = [event for stored in stream.messages for event in codec.decode(stored.data)[1]]
        return [event for event in events if isinstance(event, ScalePlanned)]

    requests = [await world.ask() for _ in range(60)]
    async with world.controlling(served(replicas_max=6)):
        decided = await world.wants(3)
        (plan,) = plans()
        assert (plan.floor, plan.requests, plan.epoch, plan.is_missed) == (3, 60, 1, False)
        assert "3 replicas would have served 99 % of the recent past in time" in decided.reason
        (stored,) = [stored for stored in stream.messages if b"ScalePlanned" in stored.data]
        assert decided.plan == decided.inputs["floor.plan"] == stored.sequence
        assert len(stored.data) < 2048
        (row,) = (await ask_sql(world.log, "select floor, counts, candidates, inputs from plans")).rows
        assert row[:2] == [3, True]
        assert tuple(map(tuple, json.loads(row[2]))) == plan.candidates
        assert json.loads(row[3])["share"] == 99
    for request in requests:
        await world.finish(request)
    # Another process leads and plans again: the log is ten minutes old, and its replicas count as less slow.
    world.ahead_ns += 600 * SECOND
    async with world.controlling(served(replicas_max=6), db="standby"):
        with anyio.fail_after(10):
            while len(plans()) < 2:
                await world.ask()
                await anyio.sleep(0.1)
        assert (plans()[1].floor, plans()[1].epoch) == (2, 2)
    # A plan of the first one that is stored late does not count.
    await world.say(plan)
    assert world.replay() == []
    at = stream.messages.index(stored)
    for changed, found in (
        ({"candidates": ((1, 9),)}, "plan RIFT_FLEET:"),
        ({"sha256": "0" * 64}, "the SHA-256 of its arrivals was 0000"),
        ({"inputs": plan.inputs | {"speed_permille": 900}}, "it was made with"),
        ({"inputs": {}}, "not those of policy"),
        ({"floor": 2}, "floor.replicas was 3, and is 2"),
    ):
        event = ScalePlanned(**{name: getattr(plan, name) for name in plan.__struct_fields__} | changed)
        data = codec.encode("autoscaler", [event])
        stream.messages[at] = type(stored)(stored.subject, stored.sequence, stored.stored_at_ns, data)
        assert any(found in line for line in world.replay()), found


def test_inputs_survive_flattening() -> None:
    demand = Demand(now_ns=5, waiting=2, past=tuple(range(PASTS)), active_at_ns=4)
    inputs = verify.Inputs(demand, Replicas(wanted=3, ready=1, start_ns=60), Policy(), UNKNOWN)
    flat = inputs.flat()
    assert all(type(value) is int for value in flat.values())
    assert (flat["demand.past.1"], flat["demand.past.9"], flat["replicas.wanted"]) == (1, 9, 3)
    again = verify.parsed(flat)
    assert (again.demand, again.replicas, again.policy) == (inputs.demand, inputs.replicas, inputs.policy)
