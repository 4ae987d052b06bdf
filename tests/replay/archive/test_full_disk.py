"""Sealing on a disk that is full or read-only: a segment is whole or not there."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from replay import disk as disks
from replay.archive.archive import Archive
from replay.disk import DiskRefused
from tests.small_disk import SmallDisk, small_disk

STREAM = "RIFT_0"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 4 << 20) as made:
        yield made


@pytest.fixture
def archive(disk: SmallDisk) -> Archive:
    return Archive(disk.path / "archive", key=b"k", content=True)


@pytest.fixture
def records(scribe: Any) -> list[Any]:
    for _ in range(60):
        scribe.finished_request()
    found: list[Any] = scribe.streams[STREAM]
    return found


def files(archive: Archive) -> set[str]:
    return {path.name for path in archive.folder.rglob("*") if path.is_file()}


def test_a_segment_that_a_full_disk_refuses_is_sealed_once_there_is_space(
    disk: SmallDisk, archive: Archive, records: list[Any]
) -> None:
    """At each amount of free space, down to one page less than a segment needs."""
    first = archive.seal(STREAM, records[:100], last=100)
    refusals = 0
    for pages in range(0, 100, 3):
        disk.fill(leave_bytes=pages * 4096)
        try:
            second = archive.seal(STREAM, records[100:], last=len(records))
        except DiskRefused as refused:
            why = str(refused)
        else:
            break
        refusals += 1
        assert "no space left on" in why
        assert archive.manifests(STREAM) == [first]
        assert not [name for name in files(archive) if name.endswith(".part")], "they occupy the disk"
        disk.free()
    assert refusals >= 3
    disk.free()
    assert archive.manifests(STREAM) == [first, second]
    assert list(archive.verify()) == []


def test_a_refusal_at_fsync_seals_nothing(
    archive: Archive, records: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that allocates late reports a full disk only there."""
    plain = os.fsync
    calls = 0
    while True:
        countdown = [calls]

        def fsync(handle: int, countdown: list[int] = countdown) -> None:
            countdown[0] -= 1
            if countdown[0] == -1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            plain(handle)

        with monkeypatch.context() as full:
            full.setattr(disks.os, "fsync", fsync)
            try:
                archive.seal(STREAM, records, last=len(records))
            except DiskRefused:
                calls += 1
            else:
                break
        # At the last fsync the manifest is in its place already, and whole.
        assert list(archive.verify()) == []
        if archive.manifests(STREAM):
            break
    assert calls >= 5
    assert archive.last(STREAM) == len(records)


def test_a_read_only_archive_is_named_and_can_be_read(
    disk: SmallDisk, archive: Archive, records: list[Any]
) -> None:
    archive.seal(STREAM, records[:100], last=100)
    disk.read_only()
    with pytest.raises(DiskRefused, match=r"read-only file system at .*archive \(\d+ MB free\)"):
        archive.seal(STREAM, records[100:], last=len(records))
    assert list(archive.verify()) == []
    disk.writable()
    archive.seal(STREAM, records[100:], last=len(records))
