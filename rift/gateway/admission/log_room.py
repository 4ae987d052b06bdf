"""Whether new requests can be stored: the gateway is not stopping, and the log is connected and has room."""

import contextlib

import anyio

from events import subjects
from events.log import Log, LogError
from rift.gateway.asgi.errors import HTTPError, retry_after

# New requests are rejected below this room: it holds 64 requests of 8 MB, and all their answers.
ROOM_BYTES_MIN = 64 * 1024 * 1024
CHECK_S = 1.0


class LogRoom:
    def __init__(self, log: Log, shard: int, stopping: anyio.Event) -> None:
        self._log = log
        self._stream = subjects.shard_stream(shard)
        self._stopping = stopping
        self._has_room = True

    async def watch(self) -> None:
        """Measure the room for as long as the gateway lives."""
        while True:
            # `is_connected` and the next append notice a log that does not answer.
            with contextlib.suppress(LogError):
                self._has_room = await self._log.room_bytes(self._stream) > ROOM_BYTES_MIN
            await anyio.sleep(CHECK_S)

    def check(self) -> None:
        """Raise HTTPError (503) if nothing new can be stored."""
        if self._stopping.is_set():
            message = "this gateway is stopping; try again"
            raise HTTPError(503, message, code="gateway_stopping", headers=retry_after(1))
        if not self._log.is_connected:
            message = "the log does not answer; try again"
            raise HTTPError(503, message, code="log_unavailable", headers=retry_after(2))
        if not self._has_room:
            message = "the log is nearly full; try again later"
            raise HTTPError(503, message, code="log_full", headers=retry_after(60))
