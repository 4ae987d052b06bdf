"""Check at a start that the log is the one that the archive and the database were made from.

With an empty log, an older copy of it, or the log of another installation, everything would start, and then
control would stop and bills would be wrong. Each file names the last record that it holds of each stream,
with its stored time. So the check reads a few records and takes milliseconds. It finds

- a log that is shorter than the archive or the database, or whose records of these sequences came later
- a book that does not hold their last record of it, which came before or after it
- a secret that signed the ids of none of the last requests
- an archive whose last segment is not the one that the log's book names, or that has none
- a stream that is missing, or shorter than the other streams say
- a stream of idempotency keys without the key of the last request that has one

It cannot find an older copy of the whole log if no file is ahead of it.
"""

from collections.abc import Iterable, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from anyio import to_thread

from events import codec, shards, subjects
from events.log import Log, Stored, last_with_events
from events.schema import SegmentSealed
from replay.archive.folder import ArchiveFolder
from replay.archive.manifest import ArchiveDamaged, Manifest
from rift.control.projection import acceptances
from rift.control.projection.key_continuity import lost_key
from rift.data_dir import RESTORE, DataDir, DataDirError
from rift.errors import RiftError

Event = TypeVar("Event")


class WrongLog(RiftError):
    """The log is not the one that the files belong to; the message gives the difference."""


class Mark(NamedTuple):
    """The last record that a file holds of a stream. `at_ns` is the largest stored time up to it."""

    file: Path
    stream: str
    sequence: int
    at_ns: int


async def check_folder(log: Log, installation: DataDir) -> None:
    """As `check`, for the embedded broker's log and its folder; raises DataDirError, with a remedy."""
    archive = ArchiveFolder(installation.archive)
    try:
        await check(
            log,
            archive,
            installation.database,
            secret=installation.secret(),
            # The first versions had neither a reserve nor content keys.
            content_keys=(installation.nats / "reserve").exists(),
        )
    except WrongLog as error:
        raise DataDirError(
            f"{installation.nats} is not the log of this folder: {error}; {RESTORE}"
        ) from error


async def check(
    log: Log,
    archive: ArchiveFolder,
    database: Path | None,
    *,
    secret: bytes,
    content_keys: bool = True,
) -> None:
    """Raise WrongLog if the log does not continue the archive and the database, or if another secret signed
    the ids of its requests. A new log may lack streams, and one without `content_keys` RIFT_SECRETS. A
    process without the database needs no archive.

    A database that is open elsewhere is left out. Raises WarehouseError, LogError.
    """
    # The files come first: control may fold and seal meanwhile.
    archived = await to_thread.run_sync(archive.streams)
    heads = await to_thread.run_sync(_heads, archive)
    marks = [Mark(archive.folder, head.stream, head.last, head.at_ns) for head in heads]
    if database is not None:
        # A gateway has none, and does not load DuckDB.
        from replay.warehouse.warehouse import WarehouseBusy, applied_marks

        with suppress(WarehouseBusy):
            applied = await to_thread.run_sync(applied_marks, database)
            marks += [Mark(database, stream, *mark) for stream, mark in applied.items()]
    existing = await log.streams()
    opened = range(await shards.count(log) if subjects.BOOK in existing else 1)
    lasts = {
        stream: await log.last_sequence(stream) if stream in existing else 0
        for stream in subjects.folded(opened)
    }
    longest = max(lasts, key=lambda stream: lasts[stream])
    wanted = {*lasts, subjects.KEYS, *([subjects.SECRETS] if content_keys else ())}
    # Records are appended only after all streams were created, perhaps just now.
    if lasts[longest] and (missing := sorted(wanted - existing - await log.streams())):
        raise WrongLog(f"the log has no stream {missing[0]}, but holds {longest} up to {lasts[longest]}")
    for mark in marks:
        await _check_mark(log, mark, lasts.get(mark.stream, 0))
    if lasts[subjects.BOOK]:
        await _check_streams(log, opened, lasts, secret)
        for head in heads:
            await _check_head(log, head)
        if database is not None:
            for stream in lasts.keys() - archived:
                if await _anchor(log, stream) is not None:
                    raise WrongLog(
                        f"the log's book names segments of {stream}, but {archive.folder} holds none"
                    )


async def _check_mark(log: Log, mark: Mark, last: int) -> None:
    if last < mark.sequence:
        raise WrongLog(f"{mark.file} holds {mark.stream} up to {mark.sequence}, but the log ends at {last}")
    stored = await log.get(mark.stream, mark.sequence)
    is_other = stored is not None and stored.stored_at_ns > mark.at_ns and not codec.is_restored(stored.data)
    if mark.stream == subjects.BOOK and (stored is None or stored.stored_at_ns < mark.at_ns):
        # The book is never trimmed. The clock may have been set back since an earlier record.
        is_other = stored is None or not await _holds_time(log, mark)
    if is_other:
        raise WrongLog(f"{mark.file} holds another record {mark.stream}:{mark.sequence} than the log")


async def _holds_time(log: Log, mark: Mark) -> bool:
    """Return whether a record of the book was stored at the mark's time."""
    async with aclosing(log.scan(mark.stream, ["rift.book.>"], first=1, target=mark.sequence)) as batches:
        async for batch in batches:
            if any(stored.stored_at_ns == mark.at_ns for stored in batch):
                return True
    return False


async def _check_streams(log: Log, opened: Iterable[int], lasts: Mapping[str, int], secret: bytes) -> None:
    """Compare the end of each stream with the records that the other streams name."""
    for stream, last in lasts.items():
        anchor = await _anchor(log, stream)
        if anchor is not None and anchor.last > last:
            raise WrongLog(
                f"the log's book names records of {stream} up to {anchor.last}, but it ends at {last}"
            )
    book = lasts[subjects.BOOK]
    for shard in opened:
        stream = subjects.shard_stream(shard)
        accepted = await acceptances.newest(log, shard, secret=secret)
        if accepted is None:
            raise WrongLog(
                f"another secret than this folder's signed the ids of the last requests in {stream}"
            )
        if (named := max((one.book for one in accepted), default=0)) > book:
            raise WrongLog(f"{stream} names the book's record {named}, but the book ends at {book}")
        if (lost := await lost_key(log, stream, accepted)) is not None:
            raise WrongLog(
                f"{subjects.KEYS} lacks the idempotency key of a request in {stream}:{lost}, so a client "
                "that repeats it would pay twice (if there is no backup, start again 24 hours after the last "
                "request: its key would have expired by then)"
            )


async def _check_head(log: Log, head: Manifest) -> None:
    """Raise WrongLog unless the book names the archive's last segment, or does not name it yet."""
    anchor = await _anchor(log, head.stream)
    # The book names a segment before control seals the next one.
    if anchor is None or anchor.last < head.last or head.sha256 == anchor.manifest:
        return
    subject = subjects.ANCHORS + head.stream.lower()
    target = await log.last_sequence(subjects.BOOK, subject)
    async with aclosing(log.scan(subjects.BOOK, [subject], first=1, target=target)) as batches:
        async for batch in batches:
            for stored in batch:
                named = _event(stored, SegmentSealed)
                if named is not None and named.manifest == head.sha256:
                    return
    raise WrongLog(
        f"the log's book does not name the archive's segment {head.first} to {head.last} of {head.stream}"
    )


def _heads(archive: ArchiveFolder) -> list[Manifest]:
    """Return the last manifest of each stream. Control reports one that cannot be read."""
    heads: list[Manifest] = []
    for stream in archive.streams():
        with suppress(ArchiveDamaged):
            if (head := archive.head(stream)) is not None:
                heads.append(head)
    return heads


async def _anchor(log: Log, stream: str) -> SegmentSealed | None:
    subject = subjects.ANCHORS + stream.lower()
    return _event(await last_with_events(log, subjects.BOOK, subject), SegmentSealed)


def _event(stored: Stored | None, kind: type[Event]) -> Event | None:
    """Return a record's first event of a kind. None if it cannot be read, which others report."""
    try:
        events = () if stored is None else codec.decode(stored.data, stored.subject)[1]
    except codec.RecordUnreadable:
        return None
    return next((event for event in events if isinstance(event, kind)), None)
