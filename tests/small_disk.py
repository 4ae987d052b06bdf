"""A small file system that a test fills up, frees, and makes read-only."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PIECE_BYTES = 1 << 16
NEEDS = "a tmpfs mount needs root, passwordless sudo, or `unshare -Urm` around pytest"


class SmallDisk:
    """A tmpfs of its own. `path` is its root folder, and `filler` the file that `fill` grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.filler = path / "filler"

    @property
    def free_bytes(self) -> int:
        state = os.statvfs(self.path)
        return state.f_bavail * state.f_frsize

    def fill(self, *, leave_bytes: int = 0) -> None:
        """Write to the filler until no more than `leave_bytes` are free (rounded down to whole pages)."""
        with self.filler.open("ab", buffering=0) as file:
            while (spare := self.free_bytes - leave_bytes) > 0:
                try:
                    file.write(bytes(min(PIECE_BYTES, spare)))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    return

    def free(self) -> None:
        """Remove the filler."""
        self.filler.unlink(missing_ok=True)

    def read_only(self) -> None:
        """Make the file system read-only. Raises CalledProcessError while a file is open for writing."""
        _as_root("mount", "-o", "remount,ro", str(self.path))

    def writable(self) -> None:
        _as_root("mount", "-o", "remount,rw", str(self.path))

    def limit_inodes(self, most: int) -> None:
        """Allow this many files and folders, with the root folder."""
        _as_root("mount", "-o", f"remount,nr_inodes={most}", str(self.path))


@contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[SmallDisk]:
    """Mount a tmpfs of `size_bytes` at `folder`, and unmount it at the end.

    Skips the test where that is not permitted. Memory is used only for what the files hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={size_bytes},mode=0700,uid={os.geteuid()},gid={os.getegid()}"
    try:
        _as_root("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        why = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        pytest.skip(f"{NEEDS}: {why}")
    try:
        yield SmallDisk(folder)
    finally:
        # Lazily: a process that the test killed may not have closed its files yet.
        _as_root("umount", "--lazy", str(folder))


def _as_root(*command: str) -> None:
    sudo = () if os.geteuid() == 0 else ("sudo", "-n")
    subprocess.run((*sudo, *command), check=True, capture_output=True, text=True)
