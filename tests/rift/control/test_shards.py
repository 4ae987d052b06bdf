"""Control follows the shards that are opened while it runs, and one that is silent stops no other."""

from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from events import memory, shards
from events.memory import MemoryBroker
from events.memory.broker import Stream
from events.publisher import Publisher
from events.schema import LaneOpened
from replay.archive.archive import Archive
from rift.control import leader_duties, process
from rift.control.config import ControlConfig
from rift.control.projection import projector
from rift.rpc import AskLanes, AskShards, Sql, ask, ask_leader

pytestmark = pytest.mark.anyio


async def test_a_silent_shard_stops_no_other_and_is_followed_once_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leader_duties, "LOG_RETRY_S", 0.1)
    monkeypatch.setattr(projector, "LOG_RETRY_S", 0.1)
    monkeypatch.setattr(projector, "CATCH_UP_S", 0.5)

    async with anyio.create_task_group() as tasks:
        broker = MemoryBroker(tasks, lambda: int(anyio.current_time() * 1e9), shards=2)
        log = memory.connect(broker)
        archive = Archive(tmp_path / "archive", key=b"k" * 32)
        run = partial(process.run, log, tmp_path / "db", archive, ControlConfig(), stop=anyio.Event())
        tasks.start_soon(run)

        async def supervised(*wanted: int) -> None:
            with anyio.fail_after(10):
                found: Any = None
                while found != list(wanted):
                    found = [row["shard"] for row in await ask_leader(log, AskShards())]
                    await anyio.sleep(0.05)

        await supervised(0)
        await shards.open_up_to(log, 3, writer="test")
        await supervised(0, 1)
        for shard in (0, 1):
            opened = LaneOpened(lane=f"lane{shard}", shard=shard)
            await Publisher(log, "gateway").publish(opened, within_s=1)
        with anyio.fail_after(10):
            while set(await ask(log, AskLanes())) != {"lane0", "lane1"}:  # noqa: ASYNC110
                await anyio.sleep(0.05)
        lag = "select stream, sequence from lag where stream like 'RIFT\\__' escape '\\' order by stream"
        assert (await ask(log, Sql(lag)))["rows"][:2] == [["RIFT_0", 1], ["RIFT_1", 1]]

        broker.streams["RIFT_2"] = Stream("rift.2.")
        await supervised(0, 1, 2)
        await Publisher(log, "gateway").publish(LaneOpened(lane="lane2", shard=2), within_s=1)
        assert ["RIFT_2", 1] in (await ask(log, Sql(lag)))["rows"]
        tasks.cancel_scope.cancel()
