"""Build a fresh warehouse from the archive, then fold the records that only the log holds."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from itertools import takewhile
from pathlib import Path

from anyio import to_thread

from events import shards, subjects
from events.log import Log, Stored
from replay.archive.archive import Archive
from replay.warehouse.rebuild import rebuild
from replay.warehouse.warehouse import Warehouse
from rift.control.projection.projector import LogTrimmed

# Records of one transaction, which costs as much as folding a thousand events; and their bytes, for memory:
# most records are some kilobytes, the largest 8 MB.
BATCH = 10_000
BATCH_BYTES = 64 * 1024 * 1024
# Records of one scan, which may take 30 s, the folding of what it yields included.
STEP = 1_000


async def rebuilt(log: Log, archive: Archive, path: Path) -> Warehouse:
    """Return a warehouse in a new file that holds the archive and the whole stored book.

    Raises LogError, ArchiveError, WarehouseError, ProjectionStopped.
    """
    last = await log.last_sequence(subjects.BOOK)
    book = [batch async for batch in log.scan(subjects.BOOK, ["rift.book.>"], first=1, target=last)]
    await to_thread.run_sync(partial(rebuild, archive, path, book=book))
    return await to_thread.run_sync(Warehouse.open, path)


async def archived(log: Log, archive: Archive, path: Path) -> Warehouse:
    """Return a warehouse in a new file that holds the archive only.

    Its book also holds the segment anchors that directly follow the archived part: requests may have been
    admitted under them, and they contain no money. Raises as `rebuilt`.
    """
    last = await log.last_sequence(subjects.BOOK)
    first = archive.last(subjects.BOOK) + 1
    book: list[Sequence[Stored]] = []
    async with aclosing(log.scan(subjects.BOOK, ["rift.book.>"], first=first, target=last)) as batches:
        async for batch in batches:
            anchors = list(takewhile(lambda stored: stored.subject.startswith(subjects.ANCHORS), batch))
            book.append(anchors)
            if len(anchors) < len(batch):
                break
    await to_thread.run_sync(partial(rebuild, archive, path, book=book))
    return await to_thread.run_sync(Warehouse.open, path)


async def fold_tail(log: Log, warehouse: Warehouse, *, until: Mapping[str, int] | None = None) -> None:
    """Apply the records after the warehouse's positions, all of them or up to `until` by stream.

    Raises LogError, LogTrimmed, ProjectionStopped.
    """
    streams = subjects.folded(range(await shards.count(log)))
    targets = until if until is not None else {}
    if until is None:
        # The book's end is read last, so it covers every request that was admitted under it.
        for stream in sorted(streams, key=lambda name: name == subjects.BOOK):
            targets = {**targets, stream: await log.last_sequence(stream)}
    # The book is applied first, since requests refer to it.
    for stream in sorted(streams, key=lambda name: name != subjects.BOOK):
        first = warehouse.positions().get(stream, 0) + 1
        target = targets.get(stream, 0)
        if first > target:
            continue
        if (log_first := await log.first_sequence(stream)) > first:
            raise LogTrimmed(f"{stream} begins at {log_first}, and {first} is not in the archive: it is lost")
        messages: list[Stored] = []
        size_bytes = 0
        async with aclosing(in_steps(log, stream, streams[stream], first, target)) as batches:
            async for batch in batches:
                messages += batch
                size_bytes += sum(len(stored.data) for stored in batch)
                if len(messages) >= BATCH or size_bytes >= BATCH_BYTES:
                    await to_thread.run_sync(warehouse.apply, stream, messages)
                    messages = []
                    size_bytes = 0
        if messages:
            await to_thread.run_sync(warehouse.apply, stream, messages)


async def in_steps(
    log: Log, stream: str, topic: str, first: int, target: int
) -> AsyncGenerator[Sequence[Stored], None]:
    """Yield a stream's messages as `scan` does, with as much time between them as the reader needs.

    Every message of the stream has the topic. Raises LogError.
    """
    for start in range(first, target + 1, STEP):
        end = min(start + STEP - 1, target)
        async with aclosing(log.scan(stream, [topic], first=start, target=end)) as batches:
            async for batch in batches:
                yield batch
