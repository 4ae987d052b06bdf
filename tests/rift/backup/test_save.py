"""Backups of a log on a real broker: complete, repeated, interrupted and refused ones."""

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from events import shards
from rift.backup import files, manifest, save, streams
from rift.backup.files import BackupError
from rift.data_dir import DataDir
from tests.rift.backup.conftest import Site
from tests.small_disk import small_disk

pytestmark = pytest.mark.anyio


def complete(folder: Path) -> manifest.Backup:
    backup = manifest.read(folder)
    assert list(manifest.damage(folder, backup)) == []
    held = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert held == {*backup.files, "backup.json"}
    return backup


async def test_a_second_backup_copies_new_segments_only(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "backup"
    await site.ask()
    await site.seal()
    first = await save.save(site.source, folder)
    assert first.segment_files == 3, "records, events and the manifest"
    assert first.manifest.positions["RIFT_0"] == 4
    assert (await save.save(site.source, folder)).segment_files == 0
    await site.ask()
    await site.seal()
    third = await save.save(site.source, folder)
    assert third.segment_files == 3
    assert complete(folder) == third.manifest
    assert third.manifest.archived == {"RIFT_0": 8}


async def test_a_backup_is_for_its_owner_only(site: Site, tmp_path: Path) -> None:
    await site.seal("RIFT_BOOK")
    await save.save(site.source, tmp_path / "backup")
    for path in (tmp_path / "backup", *(tmp_path / "backup").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_file_that_does_not_exist_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.copy(tmp_path / "dev.key", tmp_path / "copy")
    assert not list(tmp_path.iterdir())


async def test_an_interrupted_backup_leaves_the_earlier_one(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "backup"
    made = (await save.save(site.source, folder)).manifest
    real = streams.save

    async def cut(*arguments: object) -> None:
        await real(*arguments)  # type: ignore[arg-type]
        raise OSError("pulled out")

    monkeypatch.setattr(streams, "save", cut)
    await site.ask()
    with pytest.raises(OSError, match="pulled out"):
        await save.save(site.source, folder)
    assert complete(folder) == made
    monkeypatch.undo()
    # A killed one leaves its files, and the next run removes them.
    (folder / "20300101T000000Z").mkdir()
    assert complete(folder) != await save.save(site.source, folder)
    complete(folder)


async def test_a_failed_backup_removes_content_keys_that_are_too_old(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = (await save.save(site.source, tmp_path / "backup", content_keys_days=0)).manifest

    async def fail(*_: object) -> None:
        raise OSError("pulled out")

    monkeypatch.setattr(streams, "save", fail)
    with pytest.raises(OSError, match="pulled out"):
        await save.save(site.source, tmp_path / "backup")
    [missing] = manifest.damage(tmp_path / "backup", made)
    assert "RIFT_SECRETS.snapshot cannot be read" in missing


async def test_a_full_disk_leaves_the_earlier_one(site: Site, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        made = (await save.save(site.source, disk.path / "backup")).manifest
        disk.fill(leave_bytes=4096)
        with pytest.raises(BackupError, match=r"no space left on .*/disk.* earlier backup stays complete"):
            await save.save(site.source, disk.path / "backup")
        assert complete(disk.path / "backup") == made


async def test_a_shard_that_is_opened_meanwhile_is_noticed(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter((1, 2))

    async def count(log: object) -> int:
        return next(counts)

    monkeypatch.setattr(shards, "count", count)
    with pytest.raises(BackupError, match="a shard was opened during the backup"):
        await save.save(site.source, tmp_path / "backup")
    assert not (tmp_path / "backup" / "backup.json").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (lambda site: site.installation.folder / "backup", "is inside the data folder"),
        (lambda site: site.installation.folder.parent, "holds data, which does not belong to a backup"),
    ],
)
async def test_a_folder_that_is_no_place_for_a_backup(
    site: Site, place: Callable[[Site], Path], message: str
) -> None:
    with pytest.raises(BackupError, match=message):
        await save.save(site.source, place(site))


async def test_a_backup_of_another_installation_stays(site: Site, tmp_path: Path) -> None:
    made = await save.save(site.source, tmp_path / "backup")
    other = DataDir(tmp_path / "other")
    other.make()
    with pytest.raises(BackupError, match="a backup of another installation"):
        await save.save(site.source._replace(installation=other), tmp_path / "backup")
    assert complete(tmp_path / "backup") == made.manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rift": "99.0.0"}, "was made by Rift 99.0.0, which is newer than this Rift"),
        ({"format": 2}, "which is newer than this Rift"),
        ({"files": 3}, "backup.json is damaged: Expected `object`"),
    ],
)
async def test_manifests_that_cannot_be_read(
    site: Site, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = tmp_path / "backup"
    await save.save(site.source, folder)
    file = folder / "backup.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(BackupError, match=message):
        manifest.read(folder)
