"""Files that only their owner may read."""

import os
from pathlib import Path

from replay.disk import sync


def write_secret(path: Path, text: str) -> None:
    """Write a file atomically and durably, readable by its owner only."""
    _written(path, text).replace(path)
    sync(path.parent)


def create_secret(path: Path, text: str) -> None:
    """As `write_secret`, but raise FileExistsError instead of replacing a file."""
    temporary = _written(path, text)
    try:
        os.link(temporary, path)
    finally:
        temporary.unlink()
    sync(path.parent)


def _written(path: Path, text: str) -> Path:
    """Return a new file beside `path` with this text."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # A process that died may have left one, or another user may have put a link there.
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(handle, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(handle)
    except OSError:
        temporary.unlink()
        raise
    return temporary
