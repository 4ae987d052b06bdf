"""The warehouse file on a disk that is full or read-only: nothing is lost, torn, or applied twice."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from events import subjects
from replay.archive.archive import Archive
from replay.disk import DiskRefused
from replay.warehouse import warehouse
from replay.warehouse.rebuild import rebuild
from replay.warehouse.result import QueryRefused
from replay.warehouse.warehouse import Warehouse
from tests.small_disk import SmallDisk, small_disk

COUNT = "select count(*) from requests"
BATCHES = 12


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 16 << 20) as made:
        yield made


@pytest.fixture(autouse=True)
def book(scribe: Any) -> None:
    scribe.prices()


@pytest.fixture
def batches(scribe: Any) -> list[list[Any]]:
    """A shard's records in batches. They need the book, which `opened` applies."""
    for _ in range(BATCHES * 20):
        scribe.finished_request()
    records = scribe.streams["RIFT_0"]
    size = len(records) // BATCHES
    return [records[start : start + size] for start in range(0, len(records), size)]


def opened(path: Path, scribe: Any) -> Warehouse:
    made = Warehouse.open(path)
    made.apply(subjects.BOOK, scribe.streams[subjects.BOOK])
    return made


def digests(path: Path, records: list[list[Any]], scribe: Any) -> dict[str, str]:
    """Return the digests of a warehouse whose disk was never full."""
    whole = opened(path, scribe)
    for batch in records:
        whole.apply("RIFT_0", batch)
    found, _ = whole.digests()
    whole.close()
    return found


def applied(made: Warehouse, batch: list[Any]) -> bool:
    try:
        made.apply("RIFT_0", batch)
    except DiskRefused as refused:
        why = str(refused)
    else:
        return True
    assert "no space left on" in why
    assert "(0 MB free)" in why
    return False


@pytest.mark.parametrize("checkpoints", ["default", "50KB"])
def test_a_batch_that_a_full_disk_refuses_is_applied_once_when_there_is_space(
    disk: SmallDisk,
    batches: list[list[Any]],
    scribe: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    checkpoints: str,
) -> None:
    """With a small checkpoint threshold DuckDB fails in a checkpoint, after the commit, and invalidates its
    database."""
    if checkpoints != "default":
        monkeypatch.setitem(warehouse.CONFIG, "checkpoint_threshold", checkpoints)
    made = opened(disk.path / "db", scribe)
    refusals = 0
    invalidations = 0
    for number, batch in enumerate(batches):
        disk.fill(leave_bytes=number * 8192)
        while not applied(made, batch):
            refusals += 1
            invalidations += not made.is_open
            assert made.read((COUNT, []))[0].rows[0][0] >= number * 18, "questions are answered meanwhile"
            if refusals % 2 == 0:
                disk.free()
        disk.free()
        assert made.positions()["RIFT_0"] == batch[-1].sequence
    assert refusals >= 6
    assert bool(invalidations) == (checkpoints != "default")
    # A copy of the files now is what a kill leaves behind.
    for name in ("db", "db.wal"):
        if (disk.path / name).exists():
            shutil.copy(disk.path / name, tmp_path / name)
    expected = digests(tmp_path / "whole", batches, scribe)
    assert made.digests()[0] == expected
    disk.fill()
    made.close()
    for path in (tmp_path / "db", disk.path / "db"):
        again = Warehouse.open(path)
        assert again.digests()[0] == expected
        assert list(again.failed_checks()) == []
        again.close()


@pytest.mark.parametrize("pages", [0, 1, 2, 3, 4, 16])
def test_a_file_whose_creation_ran_out_of_space_is_created_again(
    disk: SmallDisk, scribe: Any, pages: int
) -> None:
    disk.fill(leave_bytes=pages * 4096)
    with pytest.raises(DiskRefused, match="no space left on"):
        Warehouse.open(disk.path / "db")
    disk.free()
    opened(disk.path / "db", scribe).close()


def test_a_short_file_of_something_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("not a database")
    with pytest.raises(warehouse.WarehouseError, match="notes cannot be opened"):
        Warehouse.open(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "not a database"


def test_a_read_only_disk_is_named_and_the_file_is_opened_later(disk: SmallDisk, scribe: Any) -> None:
    opened(disk.path / "db", scribe).close()
    disk.read_only()
    made = Warehouse(disk.path / "db")
    with pytest.raises(DiskRefused, match=r"read-only file system at .*disk \(\d+ MB free\)"):
        made.ensure_open()
    with pytest.raises(QueryRefused, match="read-only file system"):
        made.query(COUNT)
    assert made.positions() == {}
    disk.writable()
    assert made.query(COUNT).rows == [[0]]
    assert made.positions() == {subjects.BOOK: 1}
    made.close()


def test_a_file_that_lost_what_it_had_applied_is_not_continued(
    disk: SmallDisk, batches: list[list[Any]], scribe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next batch would leave a gap."""
    monkeypatch.setitem(warehouse.CONFIG, "checkpoint_threshold", "50KB")
    made = opened(disk.path / "db", scribe)
    assert applied(made, batches[0])
    disk.fill(leave_bytes=131072)
    assert not all(map(partial(applied, made), batches[1:])), "stops at the first"
    assert not made.is_open
    disk.free()
    for name in ("db", "db.wal"):
        (disk.path / name).unlink(missing_ok=True)
    with pytest.raises(warehouse.WarehouseError, match="has lost what it had applied of RIFT_"):
        made.ensure_open()
    made.close()


def test_a_rebuild_that_runs_out_of_space_leaves_no_file(
    disk: SmallDisk, batches: list[list[Any]], scribe: Any, tmp_path: Path
) -> None:
    archive = Archive(tmp_path / "archive", key=b"k")
    for stream, records in scribe.streams.items():
        archive.seal(stream, records, last=len(records))
    path = disk.path / "fresh"
    for free_kib in (0, 64, 512, 1024):
        disk.fill(leave_bytes=free_kib << 10)
        with pytest.raises(DiskRefused, match=r"no space left on|no room for temporary files on"):
            rebuild(archive, path)
        assert not path.exists()
        disk.free()
    rebuild(archive, path)
    whole = Warehouse.open(path)
    assert whole.digests()[0] == digests(tmp_path / "whole", batches, scribe)
    whole.close()
