"""A log in memory with small segments that is looked at often."""

from collections.abc import AsyncIterator

import anyio
import pytest

from events.contracts import SECOND_NS
from events.memory import MemoryBroker
from rift.control.duties import archiver as archivers
from tests.replay.conftest import scribe as scribe
from tests.rift.control.archives import SEGMENT, START_NS, Rig


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(archivers, "SEGMENT_RECORDS", SEGMENT)
    monkeypatch.setattr(archivers, "LOOK_S", 0.004)
    monkeypatch.setattr(archivers, "KEPT_NS", 60 * SECOND_NS)
    clock = [START_NS]
    async with anyio.create_task_group() as tasks:
        broker = MemoryBroker(tasks, lambda: clock[0])
        yield Rig(broker, clock)
