"""A temporary warehouse, which a command folds from the archive and the log."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from replay.facts.fold import BookBehind
from rift.cli.output import CommandFailed


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
