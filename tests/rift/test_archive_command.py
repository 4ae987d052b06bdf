"""What `rift archive verify` reads from the book."""

import anyio
import pytest

from events import memory
from events.publisher import Publisher
from events.schema import SigningKeyPublished
from replay.archive.signatures import problems, signed
from rift.cli.log.fresh_warehouse import read_anchors
from tests.replay.test_signatures import CLOSE, KEY, SEGMENT

pytestmark = pytest.mark.anyio


async def test_segments_and_closed_months_are_checked() -> None:
    async with anyio.create_task_group() as tasks:
        log = memory.connect(memory.MemoryBroker(tasks, lambda: 0))
        for event in (SigningKeyPublished(id="k", key=KEY.public), signed(SEGMENT, KEY), CLOSE):
            await Publisher(log, "test").publish(event, within_s=1)
        anchored = await read_anchors(log)
        assert anchored.stated == [signed(SEGMENT, KEY), CLOSE]
        assert len(list(problems(anchored.stated, anchored.keys))) == 1
        tasks.cancel_scope.cancel()
