"""Files of a backup: durable, for their owner only, and hashed while they are written."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from replay.archive.manifest import PIECE_BYTES, File
from replay.disk import naming, sync
from rift.errors import RiftError


class BackupError(RiftError):
    """The backup or the restore failed; the message gives the reason and the remedy."""


class Output:
    """A new file of a backup. It counts once `finish` has returned."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hashed = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hashed.update(data)
        self._size += len(data)

    def finish(self) -> File:
        """Return the size and the digest, once the file is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return File(self._size, self._hashed.hexdigest())


@contextmanager
def writing(path: Path) -> Iterator[Output]:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        yield Output(file)


def pieces(path: Path) -> Iterator[bytes]:
    """Yield a file's content."""
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def copy(source: Path, path: Path) -> File:
    """Copy a file, and return its size and its digest. An interrupted copy never has the name `path`."""
    part = path.with_name(f"{path.name}.part")
    with source.open("rb") as read, writing(part) as output:
        while piece := read.read(PIECE_BYTES):
            output.write(piece)
        copied = output.finish()
    part.replace(path)
    return copied


def write(path: Path, data: bytes) -> File:
    """Write a whole file."""
    part = path.with_name(f"{path.name}.part")
    with writing(part) as output:
        output.write(data)
        written = output.finish()
    part.replace(path)
    sync(path.parent)
    return written


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a folder that is closed to other users, if there is none, and hold its lock: two backups at once
    would remove each other's files. Raises BackupError, DiskRefused, OSError."""
    with naming(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with naming(folder):
            yield
    except BlockingIOError as error:
        raise BackupError(f"another backup or restore uses {folder}: wait until it has ended") from error
    finally:
        os.close(handle)
