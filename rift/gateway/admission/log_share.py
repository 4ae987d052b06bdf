"""How much of the log one account may take if the book does not say.

An account that is alone may take everything. If there are several, each may take a part, so that none can
fill the log, or use up its keys, for the others.
"""

import msgspec

from events import subjects
from events.book import Book
from events.contracts import LOG_KEPT_S, LOG_TRIM_S
from events.log import Log
from rift.gateway.admission.log_room import ROOM_BYTES_MIN

# One of several accounts may take a quarter: three floods at the same time still leave room for the others.
ACCOUNT_PART = 4

# What is stored now is trimmed after this time at the earliest, so the log must have room for as long.
FILL_MINUTES = int(LOG_KEPT_S + LOG_TRIM_S) // 60

# The bytes that one idempotency key, and one key of sealed content, takes in its stream.
IDEMPOTENCY_KEY_BYTES = 608
CONTENT_KEY_BYTES = 320


class LogCapacity(msgspec.Struct, frozen=True):
    """The bytes that a shard's stream, the idempotency keys and the keys of sealed content may take."""

    shard: int
    keys: int
    secrets: int


async def capacity(log: Log, shard: int) -> LogCapacity:
    """Return what the streams of a shard may hold now. Raises LogError."""
    streams = subjects.shard_stream(shard), subjects.KEYS, subjects.SECRETS
    return LogCapacity(*[await log.capacity_bytes(stream) for stream in streams])


class LogShare:
    """Each share is None if the streams are not bounded."""

    def __init__(self, capacity: LogCapacity, book: Book) -> None:
        self._capacity = capacity
        self._book = book

    def bytes_per_minute(self, account: str) -> int | None:
        """Return the share of the gateway's shard. None: unbounded, or the book sets a limit."""
        limits = self._book.limits.get(account)
        if limits is not None and limits.log_bytes_per_minute is not None:
            return None
        return self._part(self.shard_bytes_max, FILL_MINUTES)

    def idempotency_keys(self, account: str) -> int | None:
        limits = self._book.limits.get(account)
        return (limits and limits.idempotency_keys) or self._part(self._capacity.keys, IDEMPOTENCY_KEY_BYTES)

    def content_keys(self, account: str) -> int | None:
        limits = self._book.limits.get(account)
        return (limits and limits.content_keys) or self._part(self._capacity.secrets, CONTENT_KEY_BYTES)

    @property
    def shard_bytes_max(self) -> int:
        """The bytes of the shard beyond which requests are refused; 0 or less if it is not bounded."""
        return self._capacity.shard - ROOM_BYTES_MIN

    @property
    def idempotency_keys_max(self) -> int:
        return self._capacity.keys // IDEMPOTENCY_KEY_BYTES

    @property
    def content_keys_max(self) -> int:
        return self._capacity.secrets // CONTENT_KEY_BYTES

    def _part(self, bytes_max: int, each: int) -> int | None:
        parts = 1 if len(self._book.accounts) < 2 else ACCOUNT_PART
        return bytes_max // each // parts if bytes_max > 0 else None
