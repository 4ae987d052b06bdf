"""The warehouse as it was: archive and log folded up to a position, and no further."""

import re
from collections.abc import AsyncGenerator, Container, Sequence
from contextlib import aclosing

import msgspec
from anyio import to_thread

from events import subjects
from events.log import Log
from replay.archive.archive import Archive
from replay.facts import fold
from replay.facts.fold import Batch, Read
from replay.warehouse.warehouse import ProjectionStopped, Warehouse
from rift.control.projection.projector import LogTrimmed
from rift.errors import RiftError

_POSITION = re.compile(r"(RIFT_[A-Z0-9]+):([0-9]{1,18})(?:\.([0-9]{1,9}))?")


class InvalidPosition(RiftError):
    """The text names no position of this log; the message says what would."""


class Until(msgspec.Struct, frozen=True):
    """The last event that counts: of a record, the last one if `index` is None."""

    stream: str
    sequence: int
    index: int | None = None


def parse(text: str) -> Until:
    found = _POSITION.fullmatch(text)
    if found is None:
        raise InvalidPosition(
            f"{text!r} is no position; write stream:sequence or stream:sequence.index, like RIFT_0:812.0"
        )
    return Until(found[1], int(found[2]), None if found[3] is None else int(found[3]))


async def fold_until(
    log: Log, archive: Archive, warehouse: Warehouse, until: Until, shards: Sequence[int]
) -> int:
    """Apply everything up to a position, and of other streams what was stored by then; return that time.

    Raises InvalidPosition, LogError, LogTrimmed, ArchiveError, ProjectionStopped.
    """
    streams = subjects.folded(shards)
    if until.stream not in streams:
        raise InvalidPosition(f"there is no stream {until.stream!r}; known are {', '.join(streams)}")
    last = await log.last_sequence(until.stream)
    if not 1 <= until.sequence <= last:
        raise InvalidPosition(f"{until.stream} holds sequences 1 to {last}, not {until.sequence}")
    at_ns = 0
    everything = streams[until.stream], range(until.sequence + 1)
    async for records in _records(log, archive, until.stream, *everything, until.sequence):
        at_ns = max(at_ns, *(record.stored.stored_at_ns for record in records))
    for stream in sorted(streams, key=lambda name: name != subjects.BOOK):
        end = until.sequence if stream == until.stream else await log.last_sequence(stream)
        told = streams[stream], warehouse.quarantined(stream)
        async with aclosing(_records(log, archive, stream, *told, end)) as batches:
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
    log: Log, archive: Archive, stream: str, everything: str, quarantined: Container[int], last: int
) -> AsyncGenerator[Sequence[Read], None]:
    """Yield a stream's records in order, from the archive as far as it goes, then from the log."""
    archived = min(last, archive.last(stream))
    if archived:
        for records in archive.records(stream, last=archived):
            yield records
    if archived == last:
        return
    if (held := await log.first_sequence(stream)) > archived + 1:
        raise LogTrimmed(f"{stream} begins at {held}, and {archived + 1} is not in the archive: it is lost")
    async with aclosing(log.scan(stream, [everything], first=archived + 1, target=last)) as batches:
        async for messages in batches:
            batch = fold.read(stream, messages, quarantined)
            if batch.records:
                yield batch.records
            if batch.stop is not None:
                raise ProjectionStopped(stream, batch.stop)
