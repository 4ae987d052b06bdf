"""What the janitor does with what workers wrote."""

import anyio
import pytest

from events import subjects
from events.memory.broker import MemoryBroker
from events.memory.connection import connect
from events.schema import AttemptReleased
from rift.control.duties.janitor import Janitor
from rift.control.duties.supervision import AttemptRelease

pytestmark = pytest.mark.anyio

AT = subjects.Address(0, "lane1234", "m")


async def test_a_forged_delivery_is_reported_and_not_published_to(caplog: pytest.LogCaptureFixture) -> None:
    release = AttemptRelease(AT, AttemptReleased(attempt="a", why="host"), "rift.book.key.x")
    async with anyio.create_task_group() as tasks:
        janitor = Janitor(connect(MemoryBroker(tasks, lambda: 0)), shard=0)
        await janitor._give_back(release)
    assert "attempt a of a replica that is lost: 'rift.book.key.x' is no delivery of m" in caplog.text
