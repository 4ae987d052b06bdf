"""The small file system of the disk tests: full means ENOSPC, read-only means EROFS, and both end."""

import errno
from pathlib import Path

import pytest

from tests.small_disk import small_disk


def test_a_small_disk_is_full_then_free_then_read_only(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        disk.fill(leave_bytes=8192)
        assert disk.free_bytes == 8192
        disk.fill()
        with pytest.raises(OSError) as full:
            (disk.path / "note").write_bytes(b"one byte is too much")
        assert full.value.errno == errno.ENOSPC

        disk.free()
        (disk.path / "note").write_bytes(b"fits again")

        disk.read_only()
        with pytest.raises(OSError) as read_only:
            (disk.path / "note").write_bytes(b"refused")
        assert read_only.value.errno == errno.EROFS
        disk.writable()
        (disk.path / "note").write_bytes(b"fits again")
    assert list(disk.path.iterdir()) == []
