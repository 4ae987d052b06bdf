"""Continue a restored log up to the end of its archive.

The archive may reach beyond the snapshots: it was copied after them, or it survived the log. The records
between a stream's end and its archive's end are appended again from the archive, each at its own sequence. So
no later record gets a position that is known already, and every reader of the log agrees with the archive on
the requests that both know.

    book, fleet  the whole records: the archive has all of them
    shards       the events of requests whose acceptance the log holds, without their content. Requests that
                 were accepted in between are left out, since their prompts are lost: their ids are unknown
                 (404). The archive, and so every bill, has them

Requests that the archive knows as open when it ends are ended without a charge.
"""

from collections.abc import AsyncIterator, Container, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import NamedTuple

import anyio
import msgspec
from anyio import to_thread

from events import codec, ids, subjects
from events.jetstream import JetStream
from events.publisher import Publisher
from events.schema import (
    AnyEvent,
    AttemptStarted,
    ContentErased,
    LaneReported,
    Problem,
    RequestAccepted,
    RequestFinished,
    SegmentSealed,
)
from replay.archive.archive import Archive
from replay.archive.manifest import anchor_of
from replay.archive.signatures import SigningKey, signed
from replay.facts.fold import Read
from rift.backup.files import BackupError
from rift.control.projection.continuity import RESTORE_WRITER

# Records that are appended at once: the most that one atomic batch of the broker takes.
BATCH = 500

APPEND_S = 30.0

# Every reader ignores it.
NOTHING = LaneReported(lane="")

# Where an empty record is stored: no gateway has this lane.
NO_LANE = "restored"

LOST = Problem(
    code="log_lost", message="the log was lost while the request ran, and was restored from a backup"
)


class _KeyEntry(msgspec.Struct):
    """The part of an idempotency key's entry that names its request."""

    request: str


class Filled(NamedTuple):
    """The records that were appended, by stream, and the number of content keys that were erased."""

    records: Mapping[str, int]
    erased: int


class Lost:
    """The requests of one shard that were accepted after the snapshot, and their attempts."""

    def __init__(self) -> None:
        self._requests: set[str] = set()
        self._attempts: set[str] = set()

    def note(self, event: AnyEvent) -> None:
        if isinstance(event, RequestAccepted):
            self._requests.add(event.request)
        elif isinstance(event, AttemptStarted) and event.request in self._requests:
            self._attempts.add(event.attempt)

    def __contains__(self, event: object) -> bool:
        return (
            getattr(event, "request", None) in self._requests
            or getattr(event, "attempt", None) in self._attempts
        )


async def fill(log: JetStream, archive: Archive, signing_key: SigningKey | None) -> Filled:
    """Append what the log lacks of the archive, and erase the content keys that were erased meanwhile.

    Each stream exists. Raises ArchiveDamaged, LogError, BackupError.
    """
    filled = {}
    erased: set[int] = set()
    # The book is first: requests refer to it.
    for stream in sorted(archive.streams(), key=lambda name: name != subjects.BOOK):
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
    await _anchor(log, archive, signing_key)
    for sequence in erased:
        await log.erase(subjects.SECRETS, sequence)
    return Filled(filled, len(erased))


async def skip_claimed(log: JetStream) -> None:
    """Append empty records until each shard reaches the floors of the requests that idempotency keys name.

    A client that repeats such a request has it accepted now, if it was not before, and its readers begin at
    its floor. Raises LogError.
    """
    floors: dict[int, int] = {}
    target = await log.last_sequence(subjects.KEYS)
    async with aclosing(log.scan(subjects.KEYS, ["rift.keys.>"], first=1, target=target)) as batches:
        async for batch in batches:
            for stored in batch:
                request = ids.parsed(msgspec.json.decode(stored.data, type=_KeyEntry).request)
                floors[request.at.shard] = max(floors.get(request.at.shard, 0), request.floor)
    for shard, floor in floors.items():
        stream = subjects.shard_stream(shard)
        missing = range(await log.last_sequence(stream) + 1, floor + 1)
        for start in missing[::BATCH]:
            part = range(start, min(start + BATCH, missing.stop))
            await _append_all(log, stream, [(sequence, *_empty(stream)) for sequence in part])


async def end_open(log: JetStream, requests: Sequence[str], filled: Container[str]) -> int:
    """End those of the requests, open by the archive, whose stream was filled, and return how many they are.

    Raises LogError.
    """
    publisher = Publisher(log, RESTORE_WRITER)
    ended = 0
    for request in requests:
        if subjects.shard_stream(ids.parsed(request).at.shard) in filled:
            event = RequestFinished(
                request=request, attempt=None, reason="failed", output_tokens=0, error=LOST
            )
            await publisher.publish(event, within_s=APPEND_S)
            ended += 1
    return ended


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
    return stored.sequence, stored.subject, codec.encode(RESTORE_WRITER, events)


def _empty(stream: str) -> tuple[str, bytes]:
    prefix = subjects.prefix(stream)
    kind = "lane." if stream not in (subjects.BOOK, subjects.FLEET) else ""
    return f"{prefix}{kind}{NO_LANE}", codec.encode(RESTORE_WRITER, [])


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


async def _anchor(log: JetStream, archive: Archive, signing_key: SigningKey | None) -> None:
    """Name in the book the segments that it does not name, as the archiver would have."""
    for stream in archive.streams():
        stored = await log.last(subjects.BOOK, subjects.ANCHORS + stream.lower())
        events = codec.decode(stored.data)[1] if stored is not None else ()
        anchored = max((event.last for event in events if isinstance(event, SegmentSealed)), default=0)
        for segment in await to_thread.run_sync(archive.manifests, stream):
            if segment.last > anchored:
                event = signed(anchor_of(stream, segment), signing_key)
                await Publisher(log, RESTORE_WRITER).publish(event, within_s=APPEND_S)
