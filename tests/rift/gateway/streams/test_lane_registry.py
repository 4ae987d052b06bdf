"""The lanes that a gateway reads are opened one at a time."""

from typing import Any

import anyio
import pytest

from events.log import LogError
from rift.gateway.streams.lane_registry import LaneRegistry

pytestmark = pytest.mark.anyio


class SilentLog:
    """The log that an opening asks first, without an answer."""

    def __init__(self) -> None:
        self.questions = 0

    async def last_sequence(self, stream: str) -> int:
        self.questions += 1
        await anyio.sleep(0.01)
        raise LogError("the broker is away")


async def test_a_silent_log_answers_all_who_wait_for_a_lane_at_once() -> None:
    log: Any = SilentLog()
    unused: Any = None
    failed: list[int] = []
    async with anyio.create_task_group() as tasks:
        lanes = LaneRegistry(log, unused, unused, lane=(0, "own"), tasks=tasks)

        async def open_lane(number: int) -> None:
            with pytest.raises(LogError):
                await lanes.of(0, f"lane{number % 2}")
            failed.append(number)

        async with anyio.create_task_group() as clients:
            for number in range(50):
                clients.start_soon(open_lane, number)
        assert log.questions == 1
        # A later client tries again.
        await open_lane(50)
    assert log.questions == 2
    assert len(failed) == 51
