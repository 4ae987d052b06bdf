"""Space on the embedded broker's disk that stays allocated, and is released when that disk is full.

nats-server keeps the first write error of a stream until it is restarted, and a restart writes to the disk.
The supervisor therefore releases the reserve before it restarts the broker. The space then holds what the log
must still store while new requests are refused: the ends and cancellations of running requests, lane and
replica reports, and entries of the book.

The file itself is the state that all processes of the machine share. If it has its full size, requests are
accepted. If it is empty, it was released. A missing file means that nobody keeps a reserve here.
"""

import os
from pathlib import Path

# Gateways keep the same room in the log for running requests (`ROOM_BYTES_MIN`). A restart of the broker also
# writes its index, a few MB for a full log of the default size.
RESERVE_BYTES = 64 * 1024 * 1024

# Restored only if this much stays free beside it: otherwise the next records would fill the disk again.
MARGIN_BYTES = 64 * 1024 * 1024


class Reserve:
    def __init__(self, file: Path) -> None:
        self._file = file

    def is_whole(self) -> bool:
        """Return whether new requests may be stored: the reserve was not released, and can be.

        One or two system calls, so each request can ask.
        """
        try:
            size = self._file.stat().st_size
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return size >= RESERVE_BYTES and not os.statvfs(self._file).f_flag & os.ST_RDONLY

    def release(self) -> None:
        """Free the space. Does nothing without a reserve. Raises OSError."""
        if self._file.exists():
            os.truncate(self._file, 0)

    def restore(self) -> None:
        """Allocate the space, unless it is allocated. Raises OSError if the disk has no room for it and
        MARGIN_BYTES, or cannot be written to."""
        if self._file.exists() and self.is_whole():
            return
        temporary = self._file.with_name(f".{self._file.name}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                # Allocating the margin too is the only check that also respects a quota.
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES + MARGIN_BYTES)
                os.truncate(descriptor, RESERVE_BYTES)
            finally:
                os.close(descriptor)
            temporary.replace(self._file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
