"""Restores with a real broker, and their refusals."""

import os
import re
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import msgspec
import pytest
from anyio import to_thread

from events import encryption, ids, shards, subjects
from events.encryption import Secret
from events.jetstream import JetStream
from events.log import LogError
from events.request_history import HistoryReader
from events.schema import ContentErased
from events.subjects import Address
from replay.archive.archive import Archive
from replay.archive.manifest import ArchiveDamaged
from replay.warehouse.warehouse import Warehouse
from rift import book_admin
from rift.backup import broker, gap, save
from rift.backup.broker import Target
from rift.backup.files import BackupError
from rift.backup.restore import Restored, restore
from rift.control.projection import catch_up
from rift.control.projection.warehouse_host import Projection
from rift.data_dir import DataDir, DataDirError
from rift.gateway.submission.idempotency import KeyEntry
from tests.conftest import Server
from tests.rift.backup.conftest import AT, BYTES, Site

pytestmark = pytest.mark.anyio

NOTES: list[str] = []


async def restored(site: Site, backup: Path, **more: Any) -> tuple[Restored, Target]:
    target = Target(DataDir(backup.with_name("new")), None)
    return await restore(backup, target, NOTES.append, **more), target


async def keep(log: JetStream, key: bytes = b"k" * 32) -> int:
    return await encryption.keep(log, subjects.SECRET_KEPT, Secret(("req",), key))


def on_disk(key: bytes, folder: Path) -> bool:
    text = msgspec.json.encode(key)
    return any(text in path.read_bytes() for path in folder.rglob("*") if path.is_file())


async def claim(log: JetStream, digest: str, made: KeyEntry) -> None:
    await log.append(subjects.KEYS, subjects.idempotency(digest), msgspec.json.encode(made))


async def entry(log: JetStream, digest: str) -> KeyEntry:
    """Return a key's entry in force."""
    stored = await log.last(subjects.KEYS, subjects.idempotency(digest))
    assert stored is not None
    return msgspec.json.decode(stored.data, type=KeyEntry)


async def test_what_the_archive_knows_beyond_the_backup(site: Site, tmp_path: Path) -> None:
    gone, later, stays = (bytes([number]) * 32 for number in range(3))
    await site.log.erase(subjects.SECRETS, await keep(site.log, gone))
    erased, kept = await keep(site.log, later), await keep(site.log, stays)
    request = await site.ask(sealed=erased)
    running = await site.ask(ends=False)
    claimed = KeyEntry(site.request_id(floor=50), "body", "nonce", 1, 1, account="dev")
    await claim(site.log, "claimed", claimed)
    await claim(site.log, "accepted", msgspec.structs.replace(claimed, request=running))
    await save.save(site.source, tmp_path / "backup")
    await site.tell(ContentErased(request=request, sealed=erased))
    await site.log.ensure_streams(shards=2, replicas=1, max_bytes=1 << 28)
    await shards.open_up_to(site.log, 2, writer="test")
    await site.seal("RIFT_BOOK")
    for _ in range(9):
        await book_admin.issue_key(site.log, "dev")
    await site.ask(at=Address(1, AT.lane, AT.model))
    for stream in ("RIFT_0", "RIFT_1"):
        await site.seal(stream)
    book = await site.log.last_sequence(subjects.BOOK)

    done, target = await restored(site, tmp_path / "backup", surviving=site.installation.archive)

    assert done.continued.filled.records == {"RIFT_0": 1, "RIFT_1": 4, "RIFT_BOOK": 1}
    assert done.continued.filled.erased == 1
    assert (done.continued.ended, done.continued.shard) == (1, 2)
    assert [on_disk(key, target.installation.nats) for key in (gone, later, stays)] == [False, False, True]
    async with broker.opened(target, NOTES.append) as log:
        assert await encryption.secret(log, erased) is None
        assert await encryption.secret(log, kept) is not None
        assert await log.last_sequence(subjects.BOOK, subjects.SHARD_LIST) > book, "a new position"
        assert (await HistoryReader(log).read(ids.parsed(running))).life.reason == "failed"
        assert (await entry(log, "accepted")).request == running
        moved = (await entry(log, "claimed")).request
        valid = ids.verified(moved, secret=target.installation.secret(), account="dev")
        assert valid is not None
        assert (valid.at.shard, valid.floor) == (2, 0)
        assert await shards.accepting(log) == range(2, 3)
        assert await charged(log, target.installation) == 2, "also without the restored database"
        await shards.open_up_to(log, 4, writer="test")
        assert await shards.accepting(log) == range(2, 4)


async def charged(log: JetStream, installation: DataDir) -> int:
    """Build a new database as control does, and return the number of charged requests."""
    path = installation.folder / "another.duckdb"
    archive = Archive(installation.archive, key=installation.archive_key())
    with closing(Warehouse.open(path)) as warehouse:
        projection = Projection(log, path, warehouse, archive)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(projection.run)
            question = ("select count(*) from requests where charge_nanousd > 0", [])
            [result] = await projection.read(lambda now: now.read(question))
            tasks.cancel_scope.cancel()
        await to_thread.run_sync(projection.warehouse.close)
    return int(result.rows[0][0])


async def test_keys_of_sealed_content_do_not_come_back_from_an_old_backup(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catch_up, "STEP", 2)
    last = [await keep(site.log) for _ in range(3)][-1]
    await site.ask(sealed=last, ends=False)
    made = await save.save(site.source, tmp_path / "backup", content_keys_days=0)
    (tmp_path / "backup" / made.manifest.snapshot_file(subjects.SECRETS)).unlink()
    done, target = await restored(site, tmp_path / "backup", shard=3)
    assert not done.has_content_keys
    assert done.continued.shard == 3, "shards 1 and 2 may have had requests"
    assert done.continued.ended == 1, "a request that runs would end at the position of a lost record"
    async with broker.opened(target, NOTES.append) as log:
        assert await encryption.secret(log, last) is None
        assert await keep(log) == last + 1, "another key never has the number of a lost one"


async def test_a_damaged_backup_is_refused_before_anything_is_made(site: Site, tmp_path: Path) -> None:
    await site.ask()
    await site.seal()
    made = await save.save(site.source, tmp_path / "backup")
    for name in made.manifest.files:
        path = tmp_path / "backup" / name
        content = path.read_bytes()
        for damaged in (content[:-1], bytes([content[0] ^ 1]) + content[1:]):
            path.write_bytes(damaged)
            with pytest.raises(BackupError, match=f"{path.name} is not as it was saved.*use another copy"):
                await restored(site, tmp_path / "backup")
        path.unlink()
        with pytest.raises(BackupError, match=f"{path.name} cannot be read"):
            await restored(site, tmp_path / "backup")
        path.write_bytes(content)
    path = tmp_path / "backup" / "backup.json"
    # The manifest of a backup without this stream would be a valid one.
    path.write_bytes(path.read_bytes().replace(b'"RIFT_0"', b'"RIFT_8"'))
    with pytest.raises(BackupError, match=r"backup.json is damaged: its bytes have another SHA-256"):
        await restored(site, tmp_path / "backup")
    assert not (tmp_path / "new").exists()


async def test_a_damaged_archive_and_another_installations_are_refused(site: Site, tmp_path: Path) -> None:
    await site.ask()
    await save.save(site.source, tmp_path / "backup")
    await site.seal()
    lost = site.archive.path(site.archive.manifests("RIFT_0")[-1], "events")
    lost.rename(tmp_path / "events")
    with pytest.raises(BackupError, match=r"events.parquet is missing; name another copy with --archive"):
        await restored(site, tmp_path / "backup", surviving=site.installation.archive)
    shutil.rmtree(tmp_path / "new")
    (tmp_path / "events").rename(lost)
    head = site.archive.manifest_paths("RIFT_0")[-1]
    head.write_bytes(head.read_bytes().replace(b'"at_ns":1', b'"at_ns":2'))
    with pytest.raises(ArchiveDamaged, match="ends or counts otherwise than its manifest says"):
        await restored(site, tmp_path / "backup", surviving=site.installation.archive)
    shutil.rmtree(tmp_path / "new")
    # Its book has the same entries, and ends later.
    for stream in await site.log.streams():
        await site.log._remove(f"STREAM.DELETE.{stream}")
    other = Site(tmp_path / "data2", site.log)
    await other.begin()
    await book_admin.issue_key(site.log, "dev")
    await other.seal("RIFT_BOOK")
    with pytest.raises(BackupError, match=r"other records of RIFT_BOOK than the backup.*with --archive"):
        await restored(site, tmp_path / "backup", surviving=other.installation.archive)


async def test_a_pipe_in_a_backup_is_refused(site: Site, tmp_path: Path) -> None:
    made = await save.save(site.source, tmp_path / "backup")
    path = tmp_path / "backup" / made.manifest.snapshot_file("RIFT_0")
    path.unlink()
    os.mkfifo(path)
    with anyio.fail_after(5), pytest.raises(BackupError, match=r"RIFT_0.snapshot is not as it was saved"):
        await restored(site, tmp_path / "backup")


async def test_a_failed_restore_into_another_broker_names_what_it_left(
    site: Site, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut(*_: object) -> None:
        raise LogError("the broker went away")

    await save.save(site.source, tmp_path / "backup")
    for stream in await site.log.streams():
        await site.log._remove(f"STREAM.DELETE.{stream}")
    monkeypatch.setattr(gap, "fill", cut)
    NOTES.clear()
    with pytest.raises(LogError, match="went away"):
        await restore(tmp_path / "backup", Target(DataDir(tmp_path / "new"), server.address), NOTES.append)
    assert re.search(r"left streams in the broker at nats://.*remove RIFT_0, .*RIFT_BOOK", NOTES[-2])
    assert "did not finish: remove" in NOTES[-1]
    with pytest.raises(DataDirError, match="did not finish: remove the folder, and run `rift restore`"):
        await restored(site, tmp_path / "backup")
    with pytest.raises(BackupError, match="if an unfinished restore left these streams"):
        await restore(tmp_path / "backup", Target(DataDir(tmp_path / "other"), server.address), NOTES.append)
    assert not (tmp_path / "other").exists()


async def test_a_restore_into_fewer_servers(site: Site, server: Server, tmp_path: Path) -> None:
    (site.source.installation.folder / "rift.toml").write_text('fleet = "none"\nlog_replicas = 3\n')
    await save.save(site.source, tmp_path / "backup")
    for stream in await site.log.streams():
        await site.log._remove(f"STREAM.DELETE.{stream}")
    with pytest.raises(BackupError, match=r"3 copies of the log need as many servers.* --log-replicas"):
        await restore(tmp_path / "backup", Target(DataDir(tmp_path / "new"), server.address), NOTES.append)
    await restore(tmp_path / "backup", Target(DataDir(tmp_path / "one"), server.address, 1), NOTES.append)
    assert "RIFT_0" in await site.log.streams()


async def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await save.save(site.source, tmp_path / "backup")
    total = 2 * BYTES + 2 * (BYTES // 4) + 2 * (BYTES // 16)
    free = SimpleNamespace(free=total * 4 // 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(BackupError, match=r" 1656 MB free .* grow to 1241 MB"):
        await restored(site, tmp_path / "backup", shard=3)
    with pytest.raises(BackupError, match=r"940 MB free on the disk of .*, which has 939: .* grow to 704 MB"):
        await restored(site, tmp_path / "backup")
    assert not (tmp_path / "new").exists()


async def test_other_refusals(site: Site, server: Server, tmp_path: Path) -> None:
    backup, new = tmp_path / "backup", tmp_path / "new"
    with pytest.raises(BackupError, match="holds no complete backup"):
        await restored(site, backup)
    await save.save(site.source, backup)
    with pytest.raises(BackupError, match="holds no segment of an archive"):
        await restored(site, backup, surviving=tmp_path)
    new.mkdir()
    (new / "mine").touch()
    with pytest.raises(BackupError, match="is not an empty folder, and a restore replaces nothing"):
        await restored(site, backup)
    (new / "mine").unlink()
    # The broker of the fixture holds the log that was saved.
    NOTES.clear()
    with pytest.raises(BackupError, match=r"holds RIFT_0, .* already"):
        await restore(backup, Target(DataDir(new), server.address), NOTES.append)
    assert not any(new.iterdir())
