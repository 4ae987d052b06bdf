"""The shards that are open, as the book says.

Requests are divided over shards, each a stream of its own. Shard 0 always exists. `ShardOpened` opens the
next number, and none is ever closed, because the ids of its requests name it.
"""

from collections.abc import Callable

from events import codec, subjects
from events.log import Conflict, Log, Stored, last_with_events
from events.publisher import Publisher
from events.schema import ShardOpened


async def count(log: Log) -> int:
    """Return the number of open shards. Raises LogError, codec.RecordUnreadable."""
    return (await accepting(log)).stop


async def accepting(log: Log) -> range:
    """Return the open shards that new requests are accepted on: all, or since a restore those that it and
    later entries opened. Raises LogError, codec.RecordUnreadable."""
    stored = await last_with_events(log, subjects.BOOK, subjects.SHARD_LIST)
    if stored is None:
        return range(1)
    event = _opened(stored)
    return range(event.requests_from, event.shard + 1)


async def open_up_to(log: Log, wanted: int, *, writer: str, requests_from: int = 0) -> None:
    """Open shards until there are `wanted`. Their streams exist. No shard before `requests_from` accepts
    requests any more. Raises LogError, codec.RecordUnreadable."""
    publisher = Publisher(log, writer)
    while True:
        last = await log.last_sequence(subjects.BOOK, subjects.SHARD_LIST)
        opened = await accepting(log)
        if (shard := opened.stop) >= wanted:
            return
        event = ShardOpened(id=f"shard.{shard}", shard=shard, requests_from=max(opened.start, requests_from))
        try:
            await publisher.publish_at(event, expect_last=last)
        except Conflict:
            continue  # another process opened it


async def follow(log: Log, known: int, opened: Callable[[int], None]) -> None:
    """Call `opened` with each shard from `known` on, now and when it is opened, until cancelled.

    Raises LogError, codec.RecordUnreadable.
    """
    async with log.follow(subjects.BOOK, [subjects.SHARD_LIST], after=0) as reader:
        async for batch in reader:
            for stored in batch:
                if not codec.decode(stored.data, stored.subject)[1]:
                    continue
                while known <= _opened(stored).shard:
                    opened(known)
                    known += 1


def _opened(stored: Stored) -> ShardOpened:
    """Return the event of a record of the list."""
    (event,) = codec.decode(stored.data, stored.subject)[1]
    if not isinstance(event, ShardOpened):
        raise codec.RecordUnreadable(f"{stored.subject}:{stored.sequence} does not open a shard")
    return event
