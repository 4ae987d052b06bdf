"""A warehouse of the past: archive and log folded up to a position."""

import re
from collections.abc import AsyncGenerator, Container, Sequence
from contextlib import aclosing

import msgspec
from anyio import to_thread

from events import shards, subjects
from events.log import Log
from replay.archive.archive import Archive
from replay.facts import fold
from replay.facts.fold import Batch, Read
from replay.warehouse.warehouse import ProjectionStopped, Warehouse
from rift.control.projection.projector import LogTrimmed
from rift.errors import RiftError

_POSITION = re.compile(r"(RIFT_[A-Z0-9]+):([0-9]{1,18})(?:\.([0-9]{1,9}))?")


class InvalidPosition(RiftError):
    """The text is not a position of this log; the message names the valid ones."""


class Until(msgspec.Struct, frozen=True):
    """The last event to fold; the last one of the record if `index` is None."""

    stream: str
    sequence: int
    index: int | None = None


def parse(text: str) -> Until:
    """Parse `stream:sequence` or `stream:sequence.index`. Raises InvalidPosition."""
    match = _POSITION.fullmatch(text)
    if match is None:
        raise InvalidPosition(
            f"{text!r} is not a position; write stream:sequence or stream:sequence.index, like RIFT_0:812.0"
        )
    stream, sequence, index = match.groups()
    return Until(stream, int(sequence), None if index is None else int(index))


async def fold_until(log: Log, archive: Archive, warehouse: Warehouse, until: Until) -> int:
    """Apply one stream up to a position, and the others up to that position's stored time. Return that time.

    Raises InvalidPosition, LogError, LogTrimmed, ArchiveError, ProjectionStopped.
    """
    streams = subjects.folded(range(await shards.count(log)))
    if until.stream not in streams:
        raise InvalidPosition(f"there is no stream {until.stream!r}; the streams are {', '.join(streams)}")
    last = await log.last_sequence(until.stream)
    if not 1 <= until.sequence <= last:
        raise InvalidPosition(f"{until.stream} holds sequences 1 to {last}, not {until.sequence}")
    at_ns = 0
    # For the time alone, so it does not matter which records cannot be read.
    unread = range(until.sequence + 1)
    whole = _records(log, archive, until.stream, streams[until.stream], unread, until.sequence)
    async for records in whole:
        at_ns = max(at_ns, *(record.stored.stored_at_ns for record in records))
    for stream in sorted(streams, key=lambda name: name != subjects.BOOK):
        end = until.sequence if stream == until.stream else await log.last_sequence(stream)
        quarantined = warehouse.quarantined(stream)
        async with aclosing(_records(log, archive, stream, streams[stream], quarantined, end)) as batches:
            async for records in batches:
                kept = [_cut(record, until) for record in records if _counts(record, until, stream, at_ns)]
                if kept:
                    await to_thread.run_sync(warehouse.apply_batch, Batch(stream, kept))
                if len(kept) < len(records):
                    break
    return at_ns


def _counts(record: Read, until: Until, stream: str, at_ns: int) -> bool:
    return stream == until.stream or record.stored.stored_at_ns <= at_ns


def _cut(record: Read, until: Until) -> Read:
    if until.index is None or record.stored.sequence != until.sequence:
        return record
    return Read(record.stored, record.events[: until.index + 1])


async def _records(
    log: Log, archive: Archive, stream: str, stream_subjects: str, quarantined: Container[int], last: int
) -> AsyncGenerator[Sequence[Read], None]:
    """Yield a stream's records in order: the archived ones, then those that only the log holds."""
    archived = min(last, archive.last(stream))
    if archived:
        for records in archive.records(stream, last=archived):
            yield records
    if archived == last:
        return
    if (log_first := await log.first_sequence(stream)) > archived + 1:
        raise LogTrimmed(
            f"{stream} begins at {log_first}, and {archived + 1} is not in the archive: it is lost"
        )
    async with aclosing(log.scan(stream, [stream_subjects], first=archived + 1, target=last)) as batches:
        async for messages in batches:
            batch = fold.read(stream, messages, quarantined, after=archived)
            archived = messages[-1].sequence if messages else archived
            if batch.records:
                yield batch.records
            if batch.stop is not None:
                raise ProjectionStopped(stream, batch.stop)
