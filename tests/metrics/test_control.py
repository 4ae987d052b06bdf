"""What control counts and samples for its metrics."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from events import codec, subjects
from events.contracts import SQL_BYTES_MAX
from events.log import Stored
from events.memory import MemoryBroker, MemoryLog
from events.schema import AnyEvent, ControlElected, LaneLost, ReplicaLost, ReplicaStarting, ScaleDecided
from rift.control import samples
from rift.control.duties.janitor import Janitor
from rift.control.leader import Elections
from rift.control.samples import Heads
from rift.control.sql.host import SqlHost
from rift.metrics import control
from rift.rpc import QuestionRefused

DECIDED = ScaleDecided(
    model="m",
    from_replicas=0,
    to_replicas=1,
    reason="3 waiting",
    policy="p",
    positions={},
    decided_at_ns=0,
    inputs={},
    epoch=1,
)


def test_a_lag_is_as_old_as_the_oldest_head_that_is_not_applied() -> None:
    heads = Heads()
    heads.see(10, 0.0)
    heads.see(10, 10.0)
    heads.see(30, 20.0)
    assert heads.waited_s(9, 25.0) == 25.0
    assert heads.waited_s(29, 25.0) == 5.0
    assert heads.waited_s(30, 25.0) == 0.0
    heads.see(40, 30.0)
    for number in range(3 * samples.HEADS_MAX):
        heads.see(41 + number, 31.0 + number)
        assert len(heads._seen) <= samples.HEADS_MAX
    assert heads.waited_s(39, 1000.0) == 970.0


class Cluster(MemoryLog):
    async def stream_servers(self, stream: str) -> Mapping[str, str]:
        if stream == subjects.BOOK:
            return {"a": "current", "b": "silent", "c": "leader"}
        return {"a": "leader", "b": "current", "c": "current"}


@pytest.mark.anyio
async def test_a_server_is_as_bad_as_in_its_worst_stream(tmp_path: Path) -> None:
    async with anyio.create_task_group() as tasks:
        log = Cluster(MemoryBroker(tasks, lambda: 1))
        sampled = samples.Samples(log, tmp_path / "none", None)
        await sampled.take([subjects.FLEET, subjects.BOOK])
        assert sampled.servers == {"a": "current", "b": "silent", "c": "current"}
        (gauge,) = [each for each in control._of_disks(sampled) if "brokers" in str([*each.collect()])]
        (family,) = gauge.collect()
        assert {tuple(each.labels.values()) for each in family.samples} == {*sampled.servers.items()}
        tasks.cancel_scope.cancel()


def test_the_fleet_is_counted_from_the_start_of_the_process() -> None:
    elections = Elections()
    sequence = 0

    def store(event: AnyEvent) -> None:
        nonlocal sequence
        sequence += 1
        subject = subjects.LEADER if isinstance(event, ControlElected) else subjects.fleet("m")
        elections.fold(Stored(subject, sequence, sequence, codec.encode("w", [event])))

    def decide(before: int, after: int) -> None:
        store(msgspec.structs.replace(DECIDED, from_replicas=before, to_replicas=after))

    elections.counted_after = 3
    store(ControlElected(epoch=1, control="c"))
    decide(0, 4)
    store(ReplicaStarting(replica="r0", model="m", engine="sim"))
    assert not elections.counts.decisions
    assert not elections.counts.starts
    decide(4, 8)
    decide(8, 2)
    decide(0, 5)  # does not count: it follows from no decision
    decide(2, 0)
    decide(0, 1)
    for event in (
        ReplicaStarting(replica="r1", model="m", engine="sim"),
        ReplicaLost(replica="r0", model="m", cause="host"),
        ReplicaLost(replica="r1", model="m", cause="engine"),
        ReplicaLost(replica="r1", model="m", cause="engine"),
    ):
        store(event)
    assert elections.counts.decisions == {("m", each): 1 for each in ("up", "down", "to_zero", "from_zero")}
    assert elections.counts.starts == {("m",): 1}
    assert elections.counts.lost == {("m", "host"): 1, ("m", "engine"): 1}


@pytest.mark.anyio
async def test_what_a_janitor_did_is_counted_once_it_is_stored() -> None:
    acted: Counter[str] = Counter()
    async with anyio.create_task_group() as tasks:
        log = MemoryLog(MemoryBroker(tasks, lambda: 1))
        janitor = Janitor(log, shard=0, acted=acted)
        await janitor._act(LaneLost(lane="l"))
        log.connection.freeze()
        with anyio.move_on_after(0.05):
            await janitor._act(LaneLost(lane="l"))
        assert acted == {"lane_lost": 1}
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_a_question_at_a_limit_counts_as_refused() -> None:
    setup: Any = None
    host = SqlHost(setup)
    with pytest.raises(QuestionRefused):
        await host.ask("x" * (SQL_BYTES_MAX + 1))
    assert (host.asked, host.answered, host.refused) == (0, 0, 1)
