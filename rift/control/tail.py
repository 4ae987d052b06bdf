"""From the log into a warehouse, up to what is stored when it begins: what the archive does not hold yet."""

from collections.abc import Iterable, Mapping
from contextlib import aclosing

from anyio import to_thread

from events import subjects
from events.log import Log
from replay.warehouse import Warehouse
from rift.control.projector import LogTrimmed


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
        first, target = warehouse.positions().get(stream, 0) + 1, targets.get(stream, 0)
        if first > target:
            continue
        if (held := await log.first_sequence(stream)) > first:
            raise LogTrimmed(f"{stream} begins at {held}, and {first} is not in the archive: it is lost")
        async with aclosing(log.scan(stream, [streams[stream]], first=first, target=target)) as batches:
            async for batch in batches:
                await to_thread.run_sync(warehouse.apply, stream, batch)
