"""Check at a start that the stream of idempotency keys still holds the key of the last request that has one.

It keeps its records for a day only, so an empty stream is in order unless a key should still be there.
"""

from collections.abc import Sequence

from events import subjects
from events.contracts import IDEMPOTENCY_S, SECOND_NS
from events.log import Log
from rift.clock import now_ns
from rift.control.projection.acceptances import Accepted

# For the difference between the clocks of this machine and the broker.
MARGIN_NS = 3600 * SECOND_NS


async def lost_key(log: Log, stream: str, acceptances: Sequence[Accepted]) -> int | None:
    """Return the sequence of the newest request whose key is not stored, though it cannot have expired."""
    newest = next((one for one in reversed(acceptances) if one.idempotency_hash), None)
    if newest is None:
        return None
    # The key was stored after the record that the request's id names, and before its acceptance.
    before = await log.get(stream, newest.floor) if newest.floor else None
    if before is None or before.stored_at_ns + IDEMPOTENCY_S * SECOND_NS < now_ns() + MARGIN_NS:
        return None
    key = await log.last(subjects.KEYS, subjects.idempotency(newest.idempotency_hash or ""))
    return newest.sequence if key is None else None
