"""The shards that are open, as the book says.

Requests are divided over shards, each a stream of its own. Shard 0 always exists. `ShardOpened` opens the
next number, and none is ever closed, because the ids of its requests name it.
"""

from collections.abc import Callable

from events import codec, subjects
from events.log import Conflict, Log, Stored
from events.publisher import Publisher
from events.schema import ShardOpened


async def count(log: Log) -> int:
    """Return the number of open shards. Raises LogError, codec.RecordUnreadable."""
    stored = await log.last(subjects.BOOK, subjects.SHARD_LIST)
    return 1 if stored is None else _opened(stored)


async def open_up_to(log: Log, wanted: int, *, writer: str) -> None:
    """Open shards until there are `wanted`. Their streams exist. Raises LogError, codec.RecordUnreadable."""
    publisher = Publisher(log, writer)
    while True:
        last = await log.last_sequence(subjects.BOOK, subjects.SHARD_LIST)
        if (shard := await count(log)) >= wanted:
            return
        try:
            await publisher.publish_at(ShardOpened(id=f"shard.{shard}", shard=shard), expect_last=last)
        except Conflict:
            continue  # another process opened it


async def follow(log: Log, known: int, opened: Callable[[int], None]) -> None:
    """Call `opened` with each shard from `known` on, now and when it is opened, until cancelled.

    Raises LogError, codec.RecordUnreadable.
    """
    async with log.follow(subjects.BOOK, [subjects.SHARD_LIST], after=0) as reader:
        async for batch in reader:
            for stored in batch:
                while known < _opened(stored):
                    opened(known)
                    known += 1


def _opened(stored: Stored) -> int:
    """Return the number of shards that are open after a record of the list."""
    (event,) = codec.decode(stored.data)[1]
    if not isinstance(event, ShardOpened):
        raise codec.RecordUnreadable(f"{stored.subject}:{stored.sequence} does not open a shard")
    return event.shard + 1
