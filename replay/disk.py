"""Whole files, and the name of a file system that refuses writes: full, over its quota, or read-only."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from replay.errors import ReplayError

REASONS = {
    errno.ENOSPC: "no space left on",
    errno.EDQUOT: "disk quota exceeded on",
    errno.EROFS: "read-only file system at",
    errno.EIO: "input/output error on",
}
# DuckDB's setting that bounds its temporary files, at most by the free space. Its errors name no cause.
SPILL_SETTING = "max_temp_directory_size"


class DiskRefused(ReplayError):
    """A file system refuses writes; the message gives the reason, the folder and the free space."""


def refusal(path: Path, error: Exception) -> str | None:
    """Return the sentence of DiskRefused if `error` means that, else None. DuckDB only passes on the text."""
    reasons = [
        reason
        for code, reason in REASONS.items()
        if (error.errno == code if isinstance(error, OSError) else os.strerror(code) in str(error))
    ]
    if not isinstance(error, OSError) and SPILL_SETTING in str(error):
        reasons.append("no room for temporary files on")
    if not reasons:
        return None
    folder = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return f"{reasons[0]} {folder} ({shutil.disk_usage(folder).free // 1_000_000} MB free)"


@contextmanager
def naming(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Raise DiskRefused for an OSError, or another of these kinds of errors, with which the file system of
    `path` refuses a write. Other errors pass unchanged."""
    caught: tuple[type[Exception], ...] = (OSError, *kinds)
    try:
        yield
    except caught as error:
        if (why := refusal(path, error)) is None:
            raise
        raise DiskRefused(why) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path` to write to, and put it in the place of `path` once it is on disk.

    It is readable by its owner only, or by those who could read `path`. If anything fails, `path` is
    unchanged. Raises DiskRefused, OSError.
    """
    with naming(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
        beside = Path(name)
        try:
            yield beside
            sync(beside)
            if path.exists():
                shutil.copymode(path, beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or a folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
