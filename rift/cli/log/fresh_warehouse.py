"""The archive, the book's entries about it, and a temporary warehouse that a command folds from both."""

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import NamedTuple

from events import codec, shards, subjects
from events.log import Log
from events.schema import PeriodClosed, SegmentSealed, SigningKeyPublished
from replay.archive.archive import Archive
from replay.facts.fold import BookBehind
from rift.cli.connection import installation
from rift.cli.output import CommandFailed

# The segments that the book names, by stream.
Anchors = dict[str, list[SegmentSealed]]


class Anchored(NamedTuple):
    """The book's entries about the archive. `stated` are the events that control signs, in order; `keys` are
    the published ones; `log_first` is, by stream, the first sequence that the log still holds."""

    segments: Anchors
    stated: list[SegmentSealed | PeriodClosed]
    keys: set[str]
    log_first: dict[str, int]


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


async def read_anchors(log: Log) -> Anchored:
    segments: Anchors = {}
    stated: list[SegmentSealed | PeriodClosed] = []
    keys: set[str] = set()
    last = await log.last_sequence(subjects.BOOK)
    async with aclosing(log.scan(subjects.BOOK, ["rift.book.>"], first=1, target=last)) as batches:
        async for batch in batches:
            for stored in batch:
                for event in codec.decode(stored.data, stored.subject)[1]:
                    if isinstance(event, SegmentSealed | PeriodClosed):
                        stated.append(event)
                    if isinstance(event, SegmentSealed):
                        segments.setdefault(event.stream, []).append(event)
                    elif isinstance(event, SigningKeyPublished):
                        keys.add(event.key)
    streams = subjects.folded(range(await shards.count(log)))
    log_first = {stream: await log.first_sequence(stream) for stream in streams}
    return Anchored(segments, stated, keys, log_first)
