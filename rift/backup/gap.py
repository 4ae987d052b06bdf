"""Continue a restored log up to the end of its archive.

The archive may reach beyond the snapshots: it was copied after them, or it survived the log. The records
between a stream's end and its archive's end are appended again from the archive, each at its own sequence. So
no later record gets a position that is known already, and every reader of the log agrees with the archive on
the requests that both know.

    book, fleet  the whole records: the archive has all of them. Empty records follow in the book, up to the
                 last entry that a request of the archive was admitted under
    shards       the events of requests whose acceptance the log holds, without their content. Requests that
                 were accepted in between are left out, since their prompts are lost: their ids are unknown
                 (404). The archive, and so every bill, has them
"""

from collections.abc import AsyncIterator, Container, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import NamedTuple

import anyio
from anyio import to_thread

from events import codec, subjects
from events.jetstream import JetStream
from events.schema import (
    AnyEvent,
    AttemptStarted,
    ContentErased,
    LaneReported,
    RequestAccepted,
)
from replay.archive.archive import Archive
from replay.facts.fold import Read
from rift.backup.files import BackupError

# Records that are appended at once: the most that one atomic batch of the broker takes.
BATCH = 500

APPEND_S = 30.0

# The clock may have been set back between some of them: then the archive has a later time.
COMPARED = 100

# Every reader ignores it.
NOTHING = LaneReported(lane="")

# Where an empty record is stored: no gateway has this lane.
NO_LANE = "restored"


class Filled(NamedTuple):
    """The records that were appended, by stream, and the number of content keys that were erased."""

    records: Mapping[str, int]
    erased: int


class Lost:
    """The requests of one shard that were accepted after the snapshot, and their attempts. `book` is the
    last entry of the book that one of them was admitted under."""

    def __init__(self) -> None:
        self._requests: set[str] = set()
        self._attempts: set[str] = set()
        self.book = 0

    def note(self, event: AnyEvent) -> None:
        if isinstance(event, RequestAccepted):
            self._requests.add(event.request)
            self.book = max(self.book, event.book)
        elif isinstance(event, AttemptStarted) and event.request in self._requests:
            self._attempts.add(event.attempt)

    def __contains__(self, event: object) -> bool:
        return (
            getattr(event, "request", None) in self._requests
            or getattr(event, "attempt", None) in self._attempts
        )


async def fill(log: JetStream, archive: Archive) -> Filled:
    """Append what the log lacks of the archive, and erase the content keys that were erased meanwhile.

    Each stream exists. Raises ArchiveDamaged, LogError, BackupError.
    """
    filled = {}
    erased: set[int] = set()
    book = 0
    # The book is first: requests refer to it.
    for stream in sorted(archive.streams(), key=lambda name: name != subjects.BOOK):
        # `rebuild` checks the other segments.
        await to_thread.run_sync(archive.check_head, stream)
        await _check_common(log, archive, stream)
        first = await log.last_sequence(stream) + 1
        if (last := await to_thread.run_sync(archive.last, stream)) < first:
            continue
        lost = Lost()
        batches = partial(archive.records, stream, first=first, last=last)
        if stream not in (subjects.BOOK, subjects.FLEET):
            async for records in _in_thread(batches()):
                for record in records:
                    for event in record.events:
                        lost.note(event)
                        if isinstance(event, ContentErased):
                            erased.add(event.sealed)
        async for records in _in_thread(batches()):
            await _append(log, stream, records, lost)
        filled[stream] = last - first + 1
        book = max(book, lost.book)
    await _append_empty(log, subjects.BOOK, up_to=book)
    for sequence in erased:
        await log.erase(subjects.SECRETS, sequence)
    return Filled(filled, len(erased))


async def _check_common(log: JetStream, archive: Archive, stream: str) -> None:
    """Raise BackupError if the archive is another installation's: if it has other times for all of the last
    records that both hold."""
    last = min(await log.last_sequence(stream), await to_thread.run_sync(archive.last, stream))
    first = max(1, await log.first_sequence(stream), last - COMPARED)
    if last < first:
        return
    archived: dict[int, int] = {}
    async for records in _in_thread(archive.records(stream, first=first, last=last)):
        archived |= {record.stored.sequence: record.stored.stored_at_ns for record in records}
    is_other = False
    topics = [f"{subjects.prefix(stream)}>"]
    async with aclosing(log.scan(stream, topics, first=first, target=last)) as batches:
        async for batch in batches:
            for stored in batch:
                if archived.get(stored.sequence) == stored.stored_at_ns:
                    return
                # An earlier restore appended it again.
                is_other = is_other or not codec.is_restored(stored.data)
    if is_other:
        raise BackupError(
            f"the archive holds other records of {stream} than the backup: it is another installation's, so "
            "name the one with --archive that belongs to the backup"
        )


async def _append(log: JetStream, stream: str, records: Sequence[Read], lost: Container[object]) -> None:
    for start in range(0, len(records), BATCH):
        part = [_record(stream, record, lost) for record in records[start : start + BATCH]]
        await _append_all(log, stream, part)


def _record(stream: str, record: Read, lost: Container[object]) -> tuple[int, str, bytes]:
    """Return the sequence, the subject and the data of a record of the archive as it is appended again."""
    stored = record.stored
    events: Sequence[AnyEvent] = record.events
    if stream not in (subjects.BOOK, subjects.FLEET):
        at = subjects.parse(stored.subject)
        # A record without an address is a gateway's report, and one of acceptances a job.
        is_kept = at is not None and stored.subject != subjects.request(at)
        # An event keeps its index.
        events = [event if is_kept and event not in lost else NOTHING for event in events]
    if all(event is NOTHING for event in events):
        return stored.sequence, *_empty(stream)
    return stored.sequence, stored.subject, codec.encode(codec.RESTORE_WRITER, events)


def _empty(stream: str) -> tuple[str, bytes]:
    prefix = subjects.prefix(stream)
    kind = "lane." if stream not in (subjects.BOOK, subjects.FLEET) else ""
    return f"{prefix}{kind}{NO_LANE}", codec.encode(codec.RESTORE_WRITER, [])


async def _append_empty(log: JetStream, stream: str, *, up_to: int) -> None:
    missing = range(await log.last_sequence(stream) + 1, up_to + 1)
    for start in missing[::BATCH]:
        part = range(start, min(start + BATCH, missing.stop))
        await _append_all(log, stream, [(sequence, *_empty(stream)) for sequence in part])


async def _append_all(log: JetStream, stream: str, records: Sequence[tuple[int, str, bytes]]) -> None:
    """Append records that must get these sequences. Raises BackupError, LogError."""

    async def append(sequence: int, subject: str, data: bytes) -> None:
        if (stored := await log.append(stream, subject, data)) != sequence:
            raise BackupError(
                f"{stream}:{sequence} was appended at {stored}: another process uses the broker"
            )

    async with anyio.create_task_group() as tasks:
        for record in records:
            tasks.start_soon(append, *record)


async def _in_thread(batches: Iterator[Sequence[Read]]) -> AsyncIterator[Sequence[Read]]:
    while (batch := await to_thread.run_sync(next, batches, None)) is not None:
        yield batch
