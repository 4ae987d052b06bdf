"""From archive and log into a fresh warehouse: what is archived, and behind it what the log holds."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from itertools import takewhile
from pathlib import Path

from anyio import to_thread

from events import subjects
from events.log import Log, Stored
from replay.archive.archive import Archive
from replay.warehouse.rebuild import rebuild
from replay.warehouse.warehouse import Warehouse
from rift.control.projection.projector import LogTrimmed

# Messages that are applied at once: a transaction costs as much as a thousand events. And what they may hold
# of memory: a record is mostly some kilobytes, and at most 8 MB.
BATCH = 10_000
BATCH_BYTES = 64 * 1024 * 1024


async def rebuilt(log: Log, archive: Archive, path: Path) -> Warehouse:
    """Return a warehouse of what is archived, in a new file, and of the book as far as it is stored.

    Raises LogError, ArchiveError, WarehouseError, ProjectionStopped.
    """
    last = await log.last_sequence(subjects.BOOK)
    book = [batch async for batch in log.scan(subjects.BOOK, ["rift.book.>"], first=1, target=last)]
    await to_thread.run_sync(partial(rebuild, archive, path, book=book))
    return await to_thread.run_sync(Warehouse.open, path)


async def archived(log: Log, archive: Archive, path: Path) -> Warehouse:
    """Return a warehouse of what is archived and nothing else, in a new file.

    Of the book it also has the anchors of segments behind what is archived: requests may have been admitted
    under these, and they say nothing of money. Raises as `rebuilt`.
    """
    last = await log.last_sequence(subjects.BOOK)
    first = archive.last(subjects.BOOK) + 1
    book: list[Sequence[Stored]] = []
    async with aclosing(log.scan(subjects.BOOK, ["rift.book.>"], first=first, target=last)) as batches:
        async for batch in batches:
            kept = list(takewhile(lambda stored: stored.subject.startswith(subjects.ANCHORS), batch))
            book.append(kept)
            if len(kept) < len(batch):
                break
    await to_thread.run_sync(partial(rebuild, archive, path, book=book))
    return await to_thread.run_sync(Warehouse.open, path)


async def fold_tail(
    log: Log, warehouse: Warehouse, shards: Iterable[int], *, until: Mapping[str, int] | None = None
) -> None:
    """Apply what is stored behind the warehouse's positions, or up to `until` by stream.

    Raises LogError, LogTrimmed, ProjectionStopped.
    """
    streams = subjects.folded(shards)
    targets = until if until is not None else {}
    if until is None:
        # The book comes last: whatever was admitted under it is stored before.
        for stream in sorted(streams, key=lambda name: name == subjects.BOOK):
            targets = {**targets, stream: await log.last_sequence(stream)}
    for stream in sorted(streams, key=lambda name: name != subjects.BOOK):
        first = warehouse.positions().get(stream, 0) + 1
        target = targets.get(stream, 0)
        if first > target:
            continue
        if (begins := await log.first_sequence(stream)) > first:
            raise LogTrimmed(f"{stream} begins at {begins}, and {first} is not in the archive: it is lost")
        held: list[Stored] = []
        size = 0
        async with aclosing(log.scan(stream, [streams[stream]], first=first, target=target)) as batches:
            async for batch in batches:
                held += batch
                size += sum(len(stored.data) for stored in batch)
                if len(held) >= BATCH or size >= BATCH_BYTES:
                    await to_thread.run_sync(warehouse.apply, stream, held)
                    held = []
                    size = 0
        if held:
            await to_thread.run_sync(warehouse.apply, stream, held)
