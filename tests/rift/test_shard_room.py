"""Shards that the broker has no room for are not opened, not even some of them."""

import re
from pathlib import Path

import pytest

from events import shards
from events.jetstream import connect
from rift import cli
from rift.data_dir import DataDir
from rift.settings import InvalidSettings, Settings
from rift.startup import prepared
from tests.conftest import Server

pytestmark = pytest.mark.anyio

SHARD_BYTES = 1 << 28
# The other streams take five eighths of a shard's space: two shards fit, three do not.
BROKER_BYTES = SHARD_BYTES * 3


async def test_shards_without_room_on_the_broker_are_refused_as_a_whole(tmp_path: Path) -> None:
    server = Server(tmp_path)
    configuration = tmp_path / "nats.conf"
    limited = re.sub(r"max_file_store: \d+", f"max_file_store: {BROKER_BYTES}", configuration.read_text())
    configuration.write_text(limited)
    server.start()
    log = await connect(server.address.url, server.address.access("admin"), name="test")

    async def prepare(count: int | None) -> None:
        settings = Settings(shards=count, log_bytes_max=SHARD_BYTES)
        await prepared(log, settings, server.address.monitor)

    try:
        with pytest.raises(InvalidSettings, match=r"4 shards need \d+ bytes more .* has room for 805306368"):
            await prepare(4)
        assert await log.streams() == set()
        await prepare(None)
        before = await log.streams()
        with pytest.raises(InvalidSettings, match="no shard was opened: 3 shards"):
            await prepare(3)
        assert await log.streams() == before
        assert await shards.count(log) == 1
        await prepare(2)
        assert await log.streams() == before | {"RIFT_1"}
        assert await shards.count(log) == 2
    finally:
        await log.close()
        server.kill()


def test_no_shard_is_added_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = DataDir(tmp_path / "data")
    folder.make()
    folder.nats.mkdir()
    (folder.nats / "reserve").touch()
    assert cli.main(["shards", "add", "--data", str(folder.folder)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("rift: no shard was opened: the disk of ")
    assert message.count("\n") == 1
