"""The newest acceptances of a shard, by which a start knows its log.

A gateway's password for the broker is enough to append an acceptance, but not to sign a request's id. So an
acceptance counts only if this installation signed its id, and if it is the first one with this id.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

from events import codec, ids, subjects
from events.log import Log
from events.schema import RequestAccepted

# How many records of the shard are read. The second number is for a shard of long answers.
RECORDS = (1_000, 100_000)


class Accepted(NamedTuple):
    """An acceptance without its content. `floor` is in its id: a sequence below it."""

    sequence: int
    floor: int
    book: int
    idempotency_hash: str | None


async def newest(log: Log, shard: int, *, secret: bytes) -> list[Accepted] | None:
    """Return the newest acceptances of a shard in order.

    Return None if there are some, but `secret` signed the id of none. Raises LogError.
    """
    stored = await log.last(subjects.shard_stream(shard), subjects.queue(shard, "*"))
    if stored is None:
        return []
    is_foreign = False
    for records in RECORDS:
        first = max(1, stored.sequence - records)
        by_id: dict[str, Accepted] = {}
        async with aclosing(_read(log, shard, first, stored.sequence)) as read:
            async for sequence, event in read:
                signed = ids.verified(event.request, secret=secret, account=event.account)
                if signed is None:
                    is_foreign = True
                elif signed.text not in by_id:
                    by_id[signed.text] = Accepted(sequence, signed.floor, event.book, event.idempotency_hash)
        if by_id:
            # An acceptance with an older id may be a copy.
            return [one for one in by_id.values() if one.floor >= first - 1]
    return None if is_foreign else []


async def _read(
    log: Log, shard: int, first: int, target: int
) -> AsyncGenerator[tuple[int, RequestAccepted], None]:
    """Yield the acceptances between two sequences. Others report records that cannot be read."""
    scan = log.scan(subjects.shard_stream(shard), [subjects.queue(shard, "*")], first=first, target=target)
    async with aclosing(scan) as batches:
        async for batch in batches:
            for stored in batch:
                try:
                    events = codec.decode(stored.data, stored.subject)[1]
                except codec.RecordUnreadable:
                    continue
                for event in events:
                    if isinstance(event, RequestAccepted):
                        yield stored.sequence, event
