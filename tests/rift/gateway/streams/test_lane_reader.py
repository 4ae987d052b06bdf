"""What a lane's reader keeps while its clients come and go."""

from typing import Any

import anyio
import pytest

from events import ids
from events.ids import RequestId
from events.request_history import RequestHistory
from rift.gateway.streams.lane_reader import LaneReader
from tests.rift.gateway.streams.test_subscription import STARTED

pytestmark = pytest.mark.anyio

REQUEST = ids.parsed(f"req_0_aaaaaaaaaaaaaaaa_m_1_{'a' * 16}_{'a' * 13}")


class Slow:
    """Histories that are read when the test says so, in order."""

    def __init__(self) -> None:
        self.reads: list[anyio.Event] = []

    async def read_all(self, requests: list[RequestId], **limits: float) -> list[RequestHistory]:
        read = anyio.Event()
        self.reads.append(read)
        await read.wait()
        return [RequestHistory() for _ in requests]


async def test_events_are_kept_no_longer_than_for_the_earliest_client_that_attaches() -> None:
    histories = Slow()
    reader = LaneReader(None, histories)  # type: ignore[arg-type]

    def make(_: Any) -> Any:
        raise AssertionError("the log holds nothing of this request")

    async with anyio.create_task_group() as tasks:
        # One of them always attaches.
        for number in range(20):
            tasks.start_soon(reader.attach, [REQUEST], make)
            await anyio.wait_all_tasks_blocked()
            reader._fold(STARTED, REQUEST.at, number)
            if number:
                histories.reads[number - 1].set()
                await anyio.wait_all_tasks_blocked()
            assert len(reader._missed) <= 2
            assert not reader.is_idle
        histories.reads[-1].set()
    assert len(reader._missed) == 0
    assert reader.is_idle
