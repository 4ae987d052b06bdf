"""Check at a start that the stream of idempotency keys still holds the key of the last request that has one.

It keeps its records for a day only, so an empty stream is in order unless a key should still be there.
"""

from collections.abc import Sequence
from contextlib import aclosing

from events import codec, ids, subjects
from events.contracts import IDEMPOTENCY_S, SECOND_NS
from events.log import Log, Stored
from events.schema import RequestAccepted
from rift.clock import now_ns

# The newest request with a key is looked for among so many records of a shard.
RECORDS = 1_000

# For the difference between the clocks of this machine and the broker.
MARGIN_NS = 3600 * SECOND_NS


async def lost_key(log: Log, shard: int) -> int | None:
    """Return the sequence of the newest request whose key is not stored, though it cannot have expired."""
    stream = subjects.shard_stream(shard)
    pattern = subjects.queue(shard, "*")
    last = await log.last(stream, pattern)
    if last is None:
        return None
    newest = None
    first = max(1, last.sequence - RECORDS)
    async with aclosing(log.scan(stream, [pattern], first=first, target=last.sequence)) as batches:
        async for batch in batches:
            newest = _newest(batch) or newest
    if newest is None:
        return None
    sequence, accepted = newest
    # The key was stored after the record that the request's id names, and before its acceptance.
    floor = ids.parsed(accepted.request).floor
    before = await log.get(stream, floor) if floor else None
    if before is None or before.stored_at_ns + IDEMPOTENCY_S * SECOND_NS < now_ns() + MARGIN_NS:
        return None
    assert accepted.idempotency_hash is not None, "only requests with a key are looked for"
    key = await log.last(subjects.KEYS, subjects.idempotency(accepted.idempotency_hash))
    return sequence if key is None else None


def _newest(batch: Sequence[Stored]) -> tuple[int, RequestAccepted] | None:
    """Return the last request with a key, and its sequence. Others report records that cannot be read."""
    for stored in reversed(batch):
        try:
            events = codec.decode(stored.data)[1]
        except codec.RecordUnreadable:
            continue
        for event in events:
            if not isinstance(event, RequestAccepted) or event.idempotency_hash is None:
                continue
            if ids.parse_request_id(event.request) is not None:
                return stored.sequence, event
    return None
