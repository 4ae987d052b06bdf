"""Space on the embedded broker's disk that stays allocated, and is released when that disk is full.

nats-server keeps the first write error of a stream until it is restarted, and a restart writes to the disk.
The supervisor therefore releases the reserve before it restarts the broker. The space then holds what the log
must still store while new requests are refused: the ends and cancellations of running requests, lane and
replica reports, and entries of the book.

The file itself is the state that all processes of the machine share. With its full size, requests are
accepted. Empty, it was released. Missing, nobody keeps a reserve here.
"""

import contextlib
import errno
import os
import tempfile
from pathlib import Path

# Gateways keep the same room in the log for running requests (`ROOM_BYTES_MIN`). A restart of the broker also
# writes its index, a few MB for a full log of the default size.
RESERVE_BYTES = 64 * 1024 * 1024

# Restored only if this much stays free beside it: otherwise the next records would fill the disk again.
MARGIN_BYTES = 64 * 1024 * 1024

# A start writes less than this: configuration, the first entries of the book, the opening of the database.
START_BYTES = 16 * 1024 * 1024


class Reserve:
    def __init__(self, file: Path) -> None:
        self.file = file

    def is_whole(self) -> bool:
        """Return whether new requests may be stored: the reserve was not released, and could be."""
        try:
            size = self.file.stat().st_size
            return size >= RESERVE_BYTES and not os.statvfs(self.file).f_flag & os.ST_RDONLY
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def check(self) -> None:
        """Write to the reserve. Raises OSError if it was released, or if the disk takes no write."""
        if self.file.stat().st_size < RESERVE_BYTES:
            raise _no_space(self.file)
        _write(self.file)

    @property
    def free_bytes(self) -> int:
        """Return what is free on the disk, without the reserve. Raises OSError."""
        state = os.statvfs(self.file.parent)
        return state.f_bavail * state.f_frsize

    def check_start(self) -> None:
        """Raise OSError if the disk has no room for a start."""
        if self.free_bytes < START_BYTES:
            raise _no_space(self.file)

    def release(self) -> None:
        """Free the space, and note that it is released. Raises OSError."""
        os.close(os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))

    def restore(self, *, only_try: bool = False) -> None:
        """Allocate the space, unless it is allocated. Raises OSError if the disk cannot be written to, or has
        no room for the reserve and MARGIN_BYTES.

        With `only_try`, check whether that would work.
        """
        if self.file.exists() and self.file.stat().st_size >= RESERVE_BYTES:
            self.check()
            # Without a free inode, the disk takes writes, but the broker cannot start.
            with tempfile.TemporaryFile(dir=self.file.parent):
                return
        temporary = self.file.with_name(f".{self.file.name}")
        # A process that was killed here left it, with all the space that is needed.
        temporary.unlink(missing_ok=True)
        if self.free_bytes < RESERVE_BYTES + MARGIN_BYTES:
            raise _no_space(self.file)
        try:
            temporary.touch(mode=0o600)
            # Besides the free space, a quota may be the limit.
            _write(temporary, RESERVE_BYTES + MARGIN_BYTES)
            os.truncate(temporary, RESERVE_BYTES)
            if not only_try:
                temporary.replace(self.file)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def trouble(self) -> str:
        """Return a message about a reserve that was released or cannot be written to, with the remedy."""
        try:
            state = os.statvfs(self.file.parent)
            free = f"{self.free_bytes >> 20} MiB are free"
            if state.f_files and not state.f_favail:  # not every file system counts them
                free += ", but no inode"
        except OSError as error:
            free = str(error.strerror)
        return (
            f"the disk of {self.file.parent} is full or cannot be written to ({free}): new requests are "
            f"refused until it can be written to and has {(RESERVE_BYTES + MARGIN_BYTES) >> 20} MiB free"
        )


def _no_space(file: Path) -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


def _write(file: Path, allocate_bytes: int = 1) -> None:
    """Allocate bytes from the start of the file, and let the disk confirm a write. Raises OSError."""
    descriptor = os.open(file, os.O_WRONLY)
    try:
        os.posix_fallocate(descriptor, 0, allocate_bytes)
        os.write(descriptor, b"\0")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
