"""New requests are refused while the embedded broker's disk is full, before the log fails."""

from pathlib import Path

import anyio
import pytest

from events.memory import MemoryBroker, MemoryLog
from rift.gateway.admission.log_room import LogRoom
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.state import GatewayConfig
from rift.gateway.streams.log_health import LogHealth
from rift.log_disk.reserve import RESERVE_BYTES, Reserve
from tests.simulation import clock
from tests.simulation.processes import MODELS, SECRET


def test_a_released_reserve_refuses_and_a_restored_one_admits(tmp_path: Path) -> None:
    file = tmp_path / "reserve"

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            log = MemoryLog(MemoryBroker(tasks, lambda: 0))
            config = GatewayConfig(
                lane="lane", secret=SECRET, models=MODELS, served=(), entropy=bytes, reserve=Reserve(file)
            )
            room = LogRoom(log, config, LogHealth(log, 0), anyio.Event())
            room.check()
            file.touch()
            with pytest.raises(HTTPError, match="disk of the log is full") as refused:
                room.check()
            assert (refused.value.status, refused.value.code) == (503, "log_full")
            with file.open("wb") as opened:
                opened.truncate(RESERVE_BYTES)
            room.check()

    clock.run(main)
