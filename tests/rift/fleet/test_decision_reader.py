"""A driver gets each event that counts, in order, and only the final state of the past."""

import anyio
import pytest

from events import codec
from events.memory import MemoryBroker, MemoryLog
from events.publisher import destination
from events.schema import AnyEvent, ControlElected, ReplicaLost, ReplicaStarting, ScaleDecided
from rift.fleet.decision_reader import drive


class Heard:
    """A driver that does nothing but listen."""

    def __init__(self) -> None:
        self.words: list[tuple[str, str | int]] = []

    def want(self, model: str, replicas: int) -> None:
        self.words.append((model, replicas))

    def lost(self, model: str, replica: str, why: str) -> None:
        self.words.append((model, replica))

    async def run(self) -> None:
        await anyio.sleep_forever()


def decided(model: str, before: int, now: int, *, epoch: int = 0) -> ScaleDecided:
    return ScaleDecided(
        model=model,
        from_replicas=before,
        to_replicas=now,
        reason="told",
        policy="test",
        positions={},
        decided_at_ns=0,
        inputs={},
        epoch=epoch,
    )


@pytest.mark.anyio
async def test_only_events_that_count_are_passed_on() -> None:
    heard = Heard()
    async with anyio.create_task_group() as tasks:
        log = MemoryLog(MemoryBroker(tasks, lambda: 1))

        async def say(*events: AnyEvent) -> None:
            for event in events:
                await log.append(*destination(event), codec.encode("test", [event]))

        await say(decided("m", 0, 1), decided("m", 1, 2), decided("n", 0, 3))
        await say(
            ReplicaStarting(replica="old", model="m", engine="sim"), ReplicaLost(replica="old", model="m")
        )
        tasks.start_soon(drive, log, heard)
        await anyio.sleep(0.1)
        assert heard.words == [("m", 2), ("n", 3), ("m", "old")]
        await say(ControlElected(epoch=1, control="c"), decided("m", 2, 0), decided("m", 2, 1, epoch=1))
        await say(decided("m", 2, 5, epoch=1), ReplicaLost(replica="nobody", model="m"))
        await say(
            ReplicaStarting(replica="new", model="m", engine="sim"), ReplicaLost(replica="new", model="m")
        )
        await anyio.sleep(0.1)
        assert heard.words[3:] == [("m", 1), ("m", "new")]
        tasks.cancel_scope.cancel()
