"""The archiver's loop: seal what is projected into the archive, say so in the book, trim what is old.

    seal     a stream's next records become one segment, once they are many or the oldest has waited
    anchor   `SegmentSealed` in the book names the segment's manifest
    trim     whole segments leave the log that are archived, anchored, projected, before every open request,
             and past the retention; or earlier, where the log runs out of room; of the book, which is
             kept for ever, it is only told

Each step looks at what the one before it left on disk, so it may end anywhere and is gone on with. What lives
here: when. What must not: what a segment is (`replay/archive/archive.py`), and what must be kept for whom.
"""

import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Container, Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import TypeVar

import anyio
import msgspec
from anyio import to_thread

from events import codec, subjects
from events.contracts import SECOND_NS
from events.log import Log, LogError, Stored, append_until_known
from events.schema import SegmentSealed
from replay.archive.archive import Archive
from replay.archive.manifest import ArchiveError, Manifest
from replay.warehouse.result import QueryRefused

logger = logging.getLogger(__name__)

WRITER = "archiver"

Result = TypeVar("Result")

DAY_NS = 24 * 3600 * SECOND_NS

# One segment is read, written and checked as a whole. So many records, or so many bytes of them, are some
# seconds of work, and what control holds of them in memory.
SEGMENT_RECORDS = 50_000
SEGMENT_BYTES = 64 * 1024 * 1024
# Only what is archived is final, and an hour is soon enough for a bill. A year of it is 9,000 segments.
SEGMENT_AGE_S = 3600.0

# A stream with less than this part of its room is short of it: far above the 64 MiB below which gateways
# refuse (of 4 GiB), so that there is time to seal and trim. Then it is sealed more often.
ROOM_PART = 4
SHORT_AGE_S = 60.0
# Kept even so, and with a retention of 0 days: longer than a request may take (10 minutes), since a reader
# that was cut off finds the ends of its requests in the log only.
KEPT_NS = 900 * SECOND_NS

# How often the book's room is looked at, and so told of. A quarter of it lasts for months (ops/README.md).
BOOK_LOOK_S = 600.0

# Between two looks at how much waits and how much room there is: a question or two to the broker a stream.
LOOK_S = 5.0
# What failed (a full disk, a log that is away) is tried again after this.
RETRY_S = 30.0
APPEND_S = 5.0

FAILURES = (ArchiveError, LogError, OSError, QueryRefused, codec.RecordUnreadable)


PUT_BACK = "if its folder was emptied or replaced, put the one back that belongs to this log"


class _Stream(msgspec.Struct):
    """A stream, and how far it is. What is not `known` is read from archive, log and book again."""

    name: str
    everything: str
    known: bool = False
    sealed: int = 0
    # The first record that asks to be sealed, since when it waits, and behind what to look for the next.
    waiting: int = 0
    since: float = 0.0
    looked: int = 0
    # What was sealed when the trim was last considered, and when that was.
    considered: int = -1
    considered_at: float = 0.0
    retry_at: float = 0.0
    # When the room of what is never trimmed is looked at again.
    look_at: float = 0.0


class Archiver:
    """`projected` says how far each stream is applied and committed, `needed_from` the first sequence of a
    stream that somebody still needs: of an open request, or of a replica that lives; `quarantined` which
    records of a stream nobody can read."""

    def __init__(
        self,
        log: Log,
        archive: Archive,
        *,
        shards: Iterable[int],
        projected: Callable[[], Mapping[str, int]],
        needed_from: Callable[[str], Awaitable[int]],
        quarantined: Callable[[str], Container[int]],
        retention_days: int,
    ) -> None:
        self._log = log
        self._archive = archive
        self._projected = projected
        self._needed_from = needed_from
        self._quarantined = quarantined
        self._retention_ns = max(retention_days * DAY_NS, KEPT_NS)
        # The book comes last: what sealing the others says in it is sealed with it.
        self._streams = [_Stream(*item) for item in subjects.folded(shards).items()]
        self._one_at_a_time = anyio.Lock()
        self._in_thread_one_at_a_time = threading.Lock()

    async def run(self) -> None:
        """Seal and trim until cancelled. What fails is logged and tried again; nothing of it is trimmed."""
        while True:
            for stream in self._streams:
                if anyio.current_time() >= stream.retry_at:
                    await self._try(stream)
            await anyio.sleep(LOOK_S)

    async def seal_now(self) -> dict[str, Manifest]:
        """Seal every stream up to what is projected now, and return the last manifest of each.

        Raises ArchiveError, LogError, OSError.
        """
        projected = dict(self._projected())
        manifests = {}
        async with self._one_at_a_time:
            for stream in self._streams:
                await self._know(stream)
                target = projected.get(stream.name, 0)
                if await self._waits(stream, target):
                    await self._seal(stream, target, at_least=1)
                if stream.sealed:
                    manifests[stream.name] = (await self._in_thread(self._archive.manifests, stream.name))[-1]
        return manifests

    async def _try(self, stream: _Stream) -> None:
        try:
            async with self._one_at_a_time:
                await self._keep(stream)
        except FAILURES as error:
            logger.error(
                "%s is not archived, and so not trimmed: %s; trying again in %d s",
                stream.name,
                error,
                RETRY_S,
            )
            stream.known = False
            stream.considered = -1
            stream.retry_at = anyio.current_time() + RETRY_S

    async def _keep(self, stream: _Stream) -> None:
        if stream.name == subjects.BOOK and anyio.current_time() >= stream.look_at:
            stream.look_at = anyio.current_time() + BOOK_LOOK_S
            await self._tell_of_book()
        await self._know(stream)
        is_short = stream.name != subjects.BOOK and await self._is_short(stream)
        target = self._projected().get(stream.name, 0)
        if await self._waits(stream, target):
            waited_s = anyio.current_time() - stream.since
            is_old = waited_s >= (SHORT_AGE_S if is_short else SEGMENT_AGE_S)
            await self._seal(stream, target, at_least=1 if is_old else SEGMENT_RECORDS)
        is_time = is_short and anyio.current_time() - stream.considered_at >= SHORT_AGE_S
        if stream.name != subjects.BOOK and (is_time or stream.sealed > stream.considered):
            await self._trim(stream, is_short=is_short)

    # --- sealing ---------------------------------------------------------------------------------------

    async def _know(self, stream: _Stream) -> None:
        """Learn how far the stream is archived, and anchor what is not. Raises ArchiveError where archive,
        log and book do not belong together."""
        if stream.known:
            return
        name = stream.name
        manifests = await self._in_thread(self._archive.manifests, name)
        sealed = manifests[-1].last if manifests else 0
        last = await self._log.last_sequence(name)
        first = await self._log.first_sequence(name)
        if sealed > last:
            raise ArchiveError(
                f"the archive holds {name} up to {sealed}, and the log ends at {last}: {PUT_BACK}"
            )
        if sealed + 1 < first:
            raise ArchiveError(
                f"the archive holds {name} up to {sealed}, and the log begins at {first}: what is between "
                f"them is in neither; {PUT_BACK}"
            )
        anchored = await self._anchored(name, manifests)
        for manifest in manifests:
            if manifest.first > anchored:
                await self._check_log(stream, manifest)
                await self._anchor(name, manifest)
        stream.known = True
        stream.sealed = sealed
        stream.waiting = stream.looked = 0

    async def _check_log(self, stream: _Stream, manifest: Manifest) -> None:
        """Raises ArchiveError for a segment that was made before this log: the book does not know it."""
        (stored,) = await self._read(stream, manifest.last, manifest.last)
        if stored.stored_at_ns > manifest.at_ns:
            raise ArchiveError(
                f"the archive's segment {manifest.first} to {manifest.last} of {stream.name} is older than "
                f"what the log holds there, so it is another log's: {PUT_BACK}"
            )

    async def _waits(self, stream: _Stream, target: int) -> bool:
        """Say whether something waits to be sealed. The archive's own anchors in the book do not ask for it:
        each segment would make the next."""
        if stream.waiting <= stream.sealed:
            found = await self._asking(stream, target)
            if found is None:
                stream.looked = target
                return False
            (newest,) = await self._read(stream, target, target)
            waited_s = (newest.stored_at_ns - found.stored_at_ns) // SECOND_NS
            stream.waiting = found.sequence
            stream.since = anyio.current_time() - waited_s
        return True

    async def _asking(self, stream: _Stream, target: int) -> Stored | None:
        first = max(stream.sealed, stream.looked) + 1
        async with aclosing(self._scan(stream, first, target)) as batches:
            async for batch in batches:
                for stored in batch:
                    if not stored.subject.startswith(subjects.ANCHORS):
                        return stored
        return None

    async def _seal(self, stream: _Stream, target: int, *, at_least: int) -> None:
        """Seal segment by segment, until fewer than `at_least` records wait."""
        while target - stream.sealed >= at_least:
            messages = await self._read(stream, stream.sealed + 1, target)
            # Whatever ends this before its end has to look again at what is there.
            stream.known = False
            last = messages[-1].sequence
            quarantined = self._quarantined(stream.name)
            seal = partial(self._archive.seal, last=last, quarantined=quarantined)
            manifest = await self._in_thread(seal, stream.name, messages)
            await self._anchor(stream.name, manifest)
            stream.known = True
            stream.sealed = manifest.last

    async def _read(self, stream: _Stream, first: int, target: int) -> list[Stored]:
        """Return the records from `first` on that make one segment. Raises ArchiveError if one is missing."""
        last = min(target, first + SEGMENT_RECORDS - 1)
        found: list[Stored] = []
        size = 0
        async with aclosing(self._scan(stream, first, last)) as batches:
            async for batch in batches:
                found += batch
                size += sum(len(stored.data) for stored in batch)
                if size >= SEGMENT_BYTES:
                    break
        if [stored.sequence for stored in found] != list(range(first, first + (len(found) or 1))):
            raise ArchiveError(f"the log does not hold every record from {first} to {last}")
        return found

    def _scan(self, stream: _Stream, first: int, target: int) -> AsyncGenerator[Sequence[Stored], None]:
        return self._log.scan(stream.name, [stream.everything], first=first, target=target)

    async def _anchored(self, name: str, manifests: Sequence[Manifest]) -> int:
        """Return the sequence up to which the book names this archive's segments."""
        stored = await self._log.last(subjects.BOOK, subjects.ANCHORS + name.lower())
        if stored is None:
            return 0
        (anchor,) = codec.decode(stored.data)[1]
        if not isinstance(anchor, SegmentSealed):
            raise ArchiveError(f"book sequence {stored.sequence} does not name a segment: {anchor}")
        if (anchor.last, anchor.manifest) not in {(found.last, found.sha256) for found in manifests}:
            raise ArchiveError(
                f"the book says that {name} {anchor.first} to {anchor.last} is archived under manifest "
                f"{anchor.manifest}, and the archive does not hold that: {PUT_BACK}"
            )
        return anchor.last

    async def _anchor(self, name: str, manifest: Manifest) -> None:
        event = SegmentSealed(
            id=f"segment.{name}.{manifest.first}",
            stream=name,
            first=manifest.first,
            last=manifest.last,
            manifest=manifest.sha256,
        )
        data = codec.encode(WRITER, [event])
        await append_until_known(
            self._log, subjects.BOOK, subjects.ANCHORS + name.lower(), data, within_s=APPEND_S
        )

    async def _in_thread(self, call: Callable[..., Result], *arguments: object) -> Result:
        """Control does not wait for a segment when it stops; the next call waits for one that was left."""

        def alone() -> Result:
            with self._in_thread_one_at_a_time:
                return call(*arguments)

        return await to_thread.run_sync(alone, abandon_on_cancel=True)

    # --- trimming --------------------------------------------------------------------------------------

    async def _is_short(self, stream: _Stream) -> bool:
        room = await self._log.room_bytes(stream.name)
        return room * ROOM_PART < await self._log.capacity_bytes(stream.name)

    async def _tell_of_book(self) -> None:
        room = await self._log.room_bytes(subjects.BOOK)
        capacity = await self._log.capacity_bytes(subjects.BOOK)
        if room * ROOM_PART < capacity:
            logger.warning(
                "%s has %d of its %d bytes left, and is kept for ever: when it is full no key is revoked, no "
                "price is published and nothing is trimmed. Most of it are holds and settlements of accounts "
                "with credit or a budget. Raise log_bytes_max in rift.toml and start Rift again",
                subjects.BOOK,
                room,
                capacity,
            )

    def _check_files(self, manifest: Manifest) -> None:
        """Raise ArchiveError unless its files are as they were sealed: the log has the only other copy."""
        for problem in self._archive.damaged_files(manifest):
            raise ArchiveError(f"{problem}; put the file back")

    async def _trim(self, stream: _Stream, *, is_short: bool) -> None:
        stream.considered = stream.sealed
        stream.considered_at = anyio.current_time()
        name = stream.name
        projected = self._projected().get(stream.name, 0)
        manifests = await self._in_thread(self._archive.manifests, name)
        # Asked after `projected` was read: what is accepted meanwhile stands behind that.
        needed_from = await self._needed_from(name)
        first = await self._log.first_sequence(name)
        may_go = [found for found in _from(first, manifests) if found.last <= min(projected, needed_from - 1)]
        ages_ns = [manifests[-1].at_ns - found.at_ns for found in may_go]
        old = sum(age_ns >= self._retention_ns for age_ns in ages_ns)
        early = sum(age_ns >= KEPT_NS for age_ns in ages_ns) if is_short else 0
        for found in may_go[: max(old, early)]:
            await self._in_thread(self._check_files, found)
        if old:
            await self._log.trim(name, may_go[old - 1].last)
            logger.info("%s is trimmed up to %d: archived, and past its time", name, may_go[old - 1].last)
        for found in may_go[old:early]:
            if not await self._is_short(stream):
                return
            await self._log.trim(name, found.last)
            logger.warning(
                "%s runs out of room: its prompts and answers up to %d go before their time; what is billed "
                "stays in the archive",
                name,
                found.last,
            )
        if is_short and not may_go[: max(old, early)]:
            logger.warning(
                "%s runs out of room, and nothing can go: it begins at %d, is archived up to %d, projected "
                "up to %d, needed from %d, and its last %d minutes are kept",
                name,
                first,
                stream.sealed,
                projected,
                needed_from,
                KEPT_NS // SECOND_NS // 60,
            )


def _from(first: int, manifests: Sequence[Manifest]) -> list[Manifest]:
    """Return the segments that hold `first` and all behind it. Raises ArchiveError at a gap."""
    held = [found for found in manifests if found.last >= first]
    for found in held:
        if found.first > first:
            raise ArchiveError(f"the archive lacks {first} to {found.first - 1}: {PUT_BACK}")
        first = found.last + 1
    return held
