"""The reserve on the broker's disk: its blocks are real, and it comes back only with a margin."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from rift.data_dir import DataDir
from rift.log_disk.reserve import MARGIN_BYTES, RESERVE_BYTES, Reserve
from tests.small_disk import SmallDisk, small_disk

DISK_BYTES = RESERVE_BYTES + MARGIN_BYTES + (1 << 20)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", DISK_BYTES) as mounted:
        yield mounted


def test_release_frees_real_space_and_restore_takes_it_again(disk: SmallDisk) -> None:
    reserve = Reserve(disk.path / "reserve")
    assert reserve.is_whole(), "nobody keeps a reserve yet"
    reserve.restore()
    assert reserve.is_whole()
    disk.fill()
    reserve.release()
    assert not reserve.is_whole()
    assert disk.free_bytes == RESERVE_BYTES
    disk.free()
    reserve.restore()
    assert reserve.is_whole()
    assert disk.free_bytes == DISK_BYTES - RESERVE_BYTES


def test_restore_needs_a_margin_and_leaves_nothing_behind(disk: SmallDisk) -> None:
    reserve = Reserve(disk.path / "reserve")
    reserve.restore()
    reserve.release()
    disk.fill(leave_bytes=RESERVE_BYTES + MARGIN_BYTES - 4096)
    before = disk.free_bytes
    with pytest.raises(OSError) as full:
        reserve.restore()
    assert full.value.errno == errno.ENOSPC
    assert not reserve.is_whole()
    assert disk.free_bytes == before
    assert {file.name for file in disk.path.iterdir()} == {"reserve", "filler"}


def test_what_a_killed_process_left_does_not_keep_the_reserve_from_fitting(disk: SmallDisk) -> None:
    reserve = Reserve(disk.path / "reserve")
    (disk.path / ".reserve").write_bytes(bytes(RESERVE_BYTES + MARGIN_BYTES))
    reserve.restore()
    assert reserve.is_whole()


def test_a_disk_without_a_free_inode_is_refused_and_named(disk: SmallDisk) -> None:
    reserve = Reserve(disk.path / "reserve")
    reserve.restore()
    disk.limit_inodes(2)
    for only_try in (True, False):
        with pytest.raises(OSError) as full:
            reserve.restore(only_try=only_try)
        assert full.value.errno == errno.ENOSPC
    assert "MiB are free, but no inode)" in reserve.trouble()
    disk.limit_inodes(9)
    reserve.restore()


def test_a_read_only_disk_has_no_whole_reserve(disk: SmallDisk) -> None:
    reserve = Reserve(disk.path / "reserve")
    reserve.restore()
    disk.read_only()
    assert not reserve.is_whole()
    for change in (reserve.release, reserve.restore):
        with pytest.raises(OSError) as read_only:
            change()
        assert read_only.value.errno == errno.EROFS
    disk.writable()
    assert reserve.is_whole()


def test_only_the_embedded_broker_has_a_reserve(tmp_path: Path) -> None:
    folder = DataDir(tmp_path)
    assert folder.reserve(None, {}) is not None
    assert folder.reserve("nats://a:1", {}) is None
    assert folder.reserve(None, {"RIFT_NATS_URL": "nats://a:1"}) is None
