"""The archive, and a temporary warehouse that a command folds from it and the log."""

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from replay.archive.archive import Archive
from replay.facts.fold import BookBehind
from rift.cli.connection import installation
from rift.cli.output import CommandFailed


def archive(options: Namespace, *, keep_content: bool = False) -> Archive:
    """Return the installation's archive. `keep_content` is for its writer. Raises DataDirError."""
    folder = installation(options)
    return Archive(folder.archive, key=folder.archive_key(), content=keep_content)


@contextmanager
def temporary_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rift-replay-") as folder:
        yield Path(folder) / "rift.duckdb"


@contextmanager
def book_read_first() -> Iterator[None]:
    """Raise CommandFailed if the archive grew past the book, which was read before it."""
    try:
        yield
    except BookBehind as behind:
        raise CommandFailed(
            f"requests were archived while the book was read: {behind}; repeat the command"
        ) from behind
