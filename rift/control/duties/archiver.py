"""The archiver: move projected records into the archive, anchor them in the book, and trim old ones.

    archive  a stream's next records become one segment once there are enough, or once the oldest is old
    anchor   `SegmentSealed` in the book names the segment's manifest
    trim     a segment leaves the log when it is archived, anchored, projected, before every open request and
             past the retention; earlier if the log runs out of room. The book is kept for ever: when it
             fills up, the archiver only warns

Each step starts from the files and records of the one before, so a process may stop anywhere and the next one
continues. Segment files (`replay/archive/archive.py`) and the needs of readers must not be defined here.
"""

import logging
import threading
from collections.abc import AsyncGenerator, Callable, Container, Iterator, Sequence
from contextlib import aclosing, suppress
from functools import partial
from typing import TypeVar

import anyio
import msgspec
from anyio import to_thread

from events import codec, subjects
from events.contracts import LOG_KEPT_S, LOG_TRIM_S, SECOND_NS
from events.log import Log, LogError, Stored, last_with_events
from events.publisher import Publisher
from events.schema import SegmentSealed
from replay.archive.archive import Archive
from replay.archive.manifest import ArchiveError, Manifest, anchor_of
from replay.archive.signatures import SigningKey, signed
from replay.disk import DiskRefused
from replay.warehouse.result import QueryRefused
from rift.control.projection.warehouse_host import Projection

logger = logging.getLogger(__name__)

WRITER = "archiver"

Result = TypeVar("Result")

DAY_NS = 24 * 3600 * SECOND_NS

# A segment is read, written and checked as a whole. This many records or bytes are some seconds of work, and
# bound control's memory.
SEGMENT_RECORDS = 50_000
SEGMENT_BYTES = 64 * 1024 * 1024
# Only archived records are final, and within an hour is soon enough for a bill. A year has 9,000 segments.
SEGMENT_AGE_S = 3600.0

# A stream with less than this part of its room left is short of room, and archived more often. A quarter of
# 4 GiB is far above the 64 MiB below which gateways reject requests, so there is time to archive and trim.
ROOM_PART = 4
SHORT_AGE_S = 60.0
# Kept even then, and with a retention of 0 days.
KEPT_NS = int(LOG_KEPT_S) * SECOND_NS

# How often the book's room is checked. The last quarter lasts for months (ops/README.md).
BOOK_LOOK_S = 600.0

# One look asks the broker a question or two for each stream.
LOOK_S = 5.0
# The wait after a failure, such as an unreachable log, and after a refused write. Each try reads the segment
# from the log again.
RETRY_S = 30.0
DISK_RETRY_S = 10.0

assert SHORT_AGE_S + LOOK_S + RETRY_S < LOG_TRIM_S, "gateways count on room within this time"

APPEND_S = 5.0

FAILURES = (ArchiveError, DiskRefused, LogError, OSError, QueryRefused, codec.RecordUnreadable)

PUT_BACK = "if its folder was emptied or replaced, put back the one that belongs to this log"


class ArchivedStream(msgspec.Struct):
    """A stream's progress. Unless `is_known`, it is read again from the archive, the log and the book."""

    name: str
    subjects: str
    is_known: bool = False
    archived: int = 0
    # The first record that should be archived, since when it waits, and where to look for the next one.
    waiting: int = 0
    waiting_since_s: float = 0.0
    scanned: int = 0
    # `archived` when a trim was last considered, and when that was.
    trimmed_for: int = -1
    trimmed_at_s: float = 0.0
    retry_at_s: float = 0.0
    # The last try's failure, "" after a success.
    failure: str = ""
    room_check_at_s: float = 0.0


class Archiver:
    """`signing_key` signs each segment's anchor and each close of a month; None: nothing is signed."""

    def __init__(
        self,
        log: Log,
        archive: Archive,
        projection: Projection,
        *,
        retention_days: int,
        signing_key: SigningKey | None = None,
    ) -> None:
        self._log = log
        self._publisher = Publisher(log, WRITER)
        self._archive = archive
        self._projection = projection
        self._retention_ns = max(retention_days * DAY_NS, KEPT_NS)
        self._known: dict[str, ArchivedStream] = {}
        self.signing_key = signing_key
        self._one_at_a_time = anyio.Lock()
        self._thread_lock = threading.Lock()

    @property
    def _streams(self) -> list[ArchivedStream]:
        """Every stream that is projected now. The book, which is archived before each segment of a shard too,
        comes last."""
        for name, stream_subjects in self._projection.streams.items():
            self._known.setdefault(name, ArchivedStream(name, stream_subjects))
        return sorted(self._known.values(), key=lambda stream: stream.name == subjects.BOOK)

    @property
    def archived(self) -> dict[str, int]:
        """The sequence up to which each stream is archived, as far as it is known."""
        return {stream.name: stream.archived for stream in self._known.values() if stream.is_known}

    @property
    def problems(self) -> list[str]:
        """What keeps streams from being archived, a sentence each."""
        return [_failed(stream) for stream in self._streams if stream.failure]

    async def run(self) -> None:
        """Archive and trim until cancelled. A failure is logged when it begins or changes, and retried; its
        stream is not trimmed."""
        while True:
            for stream in self._streams:
                if anyio.current_time() >= stream.retry_at_s:
                    await self._try(stream)
            await anyio.sleep(LOOK_S)

    async def archive_now(self) -> dict[str, Manifest]:
        """Archive every record that is projected now, and return each stream's last manifest.

        Raises ArchiveError, DiskRefused, LogError, OSError.
        """
        projected = dict(self._projection.applied)
        manifests = {}
        async with self._one_at_a_time:
            for stream in self._streams:
                await self._learn(stream)
                target = projected.get(stream.name, 0)
                if await self._is_waiting(stream, target):
                    await self._archive_up_to(stream, target, at_least=1)
                if stream.archived:
                    manifests[stream.name] = (await self._in_thread(self._archive.manifests, stream.name))[-1]
        return manifests

    async def _try(self, stream: ArchivedStream) -> None:
        try:
            async with self._one_at_a_time:
                await self._keep(stream)
        except FAILURES as error:
            retry_s = DISK_RETRY_S if isinstance(error, DiskRefused) else RETRY_S
            if stream.failure != str(error):
                stream.failure = str(error)
                logger.error("%s; trying again in %d s", _failed(stream), retry_s)
            if isinstance(error, LogError):
                # The log's outages are named by those who wait for it.
                stream.failure = ""
            stream.is_known = False
            stream.trimmed_for = -1
            stream.retry_at_s = anyio.current_time() + retry_s
        else:
            if stream.failure:
                logger.info("%s is archived again", stream.name)
            stream.failure = ""

    async def _keep(self, stream: ArchivedStream) -> None:
        is_book = stream.name == subjects.BOOK
        if is_book and anyio.current_time() >= stream.room_check_at_s:
            stream.room_check_at_s = anyio.current_time() + BOOK_LOOK_S
            await self._warn_of_full_book()
        await self._learn(stream)
        is_short = not is_book and await self._is_short(stream)
        target = self._projection.applied.get(stream.name, 0)
        if await self._is_waiting(stream, target):
            waited_s = anyio.current_time() - stream.waiting_since_s
            is_old = waited_s >= (SHORT_AGE_S if is_short else SEGMENT_AGE_S)
            await self._archive_up_to(stream, target, at_least=1 if is_old else SEGMENT_RECORDS)
        is_time = is_short and anyio.current_time() - stream.trimmed_at_s >= SHORT_AGE_S
        if not is_book and (is_time or stream.archived > stream.trimmed_for):
            await self._trim(stream, is_short=is_short)

    # --- archiving -------------------------------------------------------------------------------------

    async def _learn(self, stream: ArchivedStream) -> None:
        """Read how far the stream is archived, and append missing anchors. Raises ArchiveError if the
        archive, the log and the book do not belong together."""
        if stream.is_known:
            return
        name = stream.name
        manifests = await self._in_thread(self._archive.manifests, name)
        archived = manifests[-1].last if manifests else 0
        last = await self._log.last_sequence(name)
        first = await self._log.first_sequence(name)
        if archived > last:
            raise ArchiveError(
                f"the archive holds {name} up to {archived}, but the log ends at {last}: {PUT_BACK}"
            )
        if archived + 1 < first:
            raise ArchiveError(
                f"the archive holds {name} up to {archived}, but the log begins at {first}, and neither "
                f"holds the records between them; {PUT_BACK}"
            )
        anchored = await self._anchored(name, manifests)
        for manifest in manifests:
            if manifest.first > anchored:
                await self._check_log(stream, manifest)
                await self._anchor(stream.name, manifest)
        stream.is_known = True
        stream.archived = archived
        stream.waiting = 0
        stream.scanned = 0

    async def _check_log(self, stream: ArchivedStream, manifest: Manifest) -> None:
        """Raise ArchiveError for a segment without an anchor that is older than this log's record, unless a
        restore appended the record from it."""
        (stored,) = await self._read(stream, manifest.last, manifest.last)
        if stored.stored_at_ns > manifest.at_ns and not codec.is_restored(stored.data):
            raise ArchiveError(
                f"the archive's segment {manifest.first} to {manifest.last} of {stream.name} is older than "
                f"the log's records of these sequences, so it belongs to another log: {PUT_BACK}"
            )

    async def _is_waiting(self, stream: ArchivedStream, target: int) -> bool:
        """Return whether a record waits to be archived. Anchors do not count: each segment of the book would
        cause the next one."""
        if stream.waiting <= stream.archived:
            first = await self._first_waiting(stream, target)
            if first is None:
                stream.scanned = target
                return False
            (newest,) = await self._read(stream, target, target)
            waited_s = (newest.stored_at_ns - first.stored_at_ns) // SECOND_NS
            stream.waiting = first.sequence
            stream.waiting_since_s = anyio.current_time() - waited_s
        return True

    async def _first_waiting(self, stream: ArchivedStream, target: int) -> Stored | None:
        first = max(stream.archived, stream.scanned) + 1
        async with aclosing(self._scan(stream, first, target)) as batches:
            async for batch in batches:
                for stored in batch:
                    if not stored.subject.startswith(subjects.ANCHORS):
                        return stored
        return None

    async def _archive_up_to(self, stream: ArchivedStream, target: int, *, at_least: int) -> None:
        """Archive segment by segment, until fewer than `at_least` records wait."""
        if stream.name not in (subjects.BOOK, subjects.FLEET) and target - stream.archived >= at_least:
            await self._archive_book()
        while target - stream.archived >= at_least:
            messages = await self._read(stream, stream.archived + 1, target)
            # If anything interrupts this, the progress has to be read again.
            stream.is_known = False
            last = messages[-1].sequence
            quarantined = self._projection.quarantined(stream.name)
            seal = partial(self._archive.seal, last=last, quarantined=quarantined)
            manifest = await self._in_thread(seal, stream.name, messages)
            await self._anchor(stream.name, manifest)
            stream.is_known = True
            stream.archived = manifest.last

    async def _archive_book(self) -> None:
        """Archive what the requests of the next segment were admitted under, such as prices: an archive that
        outlives the log lacks none. A failure is the book's, which is tried by itself."""
        with suppress(ArchiveError):
            book = next(stream for stream in self._streams if stream.name == subjects.BOOK)
            await self._learn(book)
            target = self._projection.applied.get(book.name, 0)
            if await self._is_waiting(book, target):
                await self._archive_up_to(book, target, at_least=1)

    async def _read(self, stream: ArchivedStream, first: int, target: int) -> list[Stored]:
        """Return the records of one segment, from `first` on. Raises ArchiveError if one is missing that is
        not quarantined."""
        last = min(target, first + SEGMENT_RECORDS - 1)
        messages: list[Stored] = []
        size_bytes = 0
        async with aclosing(self._scan(stream, first, last)) as batches:
            async for batch in batches:
                messages += batch
                size_bytes += sum(len(stored.data) for stored in batch)
                if size_bytes >= SEGMENT_BYTES:
                    break
        messages = list(_with_lost(messages, first, self._projection.quarantined(stream.name)))
        if [stored.sequence for stored in messages] != list(range(first, first + (len(messages) or 1))):
            raise ArchiveError(f"the log does not hold every record from {first} to {last}")
        return messages

    def _scan(
        self, stream: ArchivedStream, first: int, target: int
    ) -> AsyncGenerator[Sequence[Stored], None]:
        return self._log.scan(stream.name, [stream.subjects], first=first, target=target)

    async def _anchored(self, name: str, manifests: Sequence[Manifest]) -> int:
        """Return the sequence up to which the book anchors this archive's segments."""
        stored = await last_with_events(self._log, subjects.BOOK, subjects.ANCHORS + name.lower())
        if stored is None:
            return 0
        (anchor,) = codec.decode(stored.data, stored.subject)[1]
        if not isinstance(anchor, SegmentSealed):
            raise ArchiveError(f"book sequence {stored.sequence} does not name a segment: {anchor}")
        if (anchor.last, anchor.manifest) not in {(found.last, found.sha256) for found in manifests}:
            raise ArchiveError(
                f"the book anchors {name} {anchor.first} to {anchor.last} under manifest {anchor.manifest}, "
                f"which the archive does not hold: {PUT_BACK}"
            )
        return anchor.last

    async def _anchor(self, name: str, manifest: Manifest) -> None:
        event = signed(anchor_of(name, manifest), self.signing_key)
        await self._publisher.publish(event, within_s=APPEND_S)

    async def _in_thread(self, call: Callable[..., Result], *arguments: object) -> Result:
        """Call in a thread that a stopping process does not wait for; the next call waits for it."""

        def alone() -> Result:
            with self._thread_lock:
                return call(*arguments)

        return await to_thread.run_sync(alone, abandon_on_cancel=True)

    # --- trimming --------------------------------------------------------------------------------------

    async def _is_short(self, stream: ArchivedStream) -> bool:
        room_bytes = await self._log.room_bytes(stream.name)
        return room_bytes * ROOM_PART < await self._log.capacity_bytes(stream.name)

    async def _warn_of_full_book(self) -> None:
        room_bytes = await self._log.room_bytes(subjects.BOOK)
        capacity_bytes = await self._log.capacity_bytes(subjects.BOOK)
        if room_bytes * ROOM_PART < capacity_bytes:
            logger.warning(
                "%s has %d of its %d bytes left, and is kept for ever: when it is full no key is revoked, no "
                "price is published and nothing is trimmed. Most of it are holds and settlements of accounts "
                "with credit or a budget. Raise log_bytes_max in rift.toml and start Rift again",
                subjects.BOOK,
                room_bytes,
                capacity_bytes,
            )

    def _check_files(self, manifest: Manifest) -> None:
        """Raise ArchiveError if the segment's files have changed: the log has the only other copy."""
        for problem in self._archive.damaged_files(manifest):
            raise ArchiveError(f"{problem}; put the file back")

    async def _trim(self, stream: ArchivedStream, *, is_short: bool) -> None:
        stream.trimmed_for = stream.archived
        stream.trimmed_at_s = anyio.current_time()
        name = stream.name
        projected = self._projection.applied.get(name, 0)
        manifests = await self._in_thread(self._archive.manifests, name)
        # Read after `projected`: a request that is accepted meanwhile comes after that.
        needed_from = await self._projection.needed_from(name)
        first = await self._log.first_sequence(name)
        candidates = [
            manifest
            for manifest in _from(first, manifests)
            if manifest.last <= min(projected, needed_from - 1)
        ]
        ages_ns = [manifests[-1].at_ns - manifest.at_ns for manifest in candidates]
        old = sum(age_ns >= self._retention_ns for age_ns in ages_ns)
        early = sum(age_ns >= KEPT_NS for age_ns in ages_ns) if is_short else 0
        for manifest in candidates[: max(old, early)]:
            await self._in_thread(self._check_files, manifest)
        if old:
            last = candidates[old - 1].last
            await self._log.trim(name, last)
            logger.info("%s is trimmed up to %d: archived, and past its retention", name, last)
        for manifest in candidates[old:early]:
            if not await self._is_short(stream):
                return
            await self._log.trim(name, manifest.last)
            logger.warning(
                "%s is running out of room: its prompts and answers up to %d are removed before their "
                "retention ends; billing data stays in the archive",
                name,
                manifest.last,
            )
        if is_short and not candidates[: max(old, early)]:
            logger.warning(
                "%s is running out of room, and nothing can be removed: it begins at %d, is archived up to "
                "%d, projected up to %d, needed from %d, and its last %d minutes are kept",
                name,
                first,
                stream.archived,
                projected,
                needed_from,
                KEPT_NS // SECOND_NS // 60,
            )


def _failed(stream: ArchivedStream) -> str:
    return f"{stream.name} is not archived, and so not trimmed: {stream.failure}"


def _with_lost(messages: Sequence[Stored], first: int, quarantined: Container[int]) -> Iterator[Stored]:
    """Yield the messages from `first` on, and an empty one for each quarantined one that the log has lost."""
    for stored in messages:
        while first < stored.sequence and first in quarantined:
            yield Stored("", first, stored.stored_at_ns, b"")
            first += 1
        yield stored
        first += 1


def _from(first: int, manifests: Sequence[Manifest]) -> list[Manifest]:
    """Return the segments from the one that holds `first` on. Raises ArchiveError at a gap."""
    segments = [manifest for manifest in manifests if manifest.last >= first]
    for manifest in segments:
        if manifest.first > first:
            raise ArchiveError(f"the archive lacks {first} to {manifest.first - 1}: {PUT_BACK}")
        first = manifest.last + 1
    return segments
