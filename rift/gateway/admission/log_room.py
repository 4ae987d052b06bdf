"""Whether new requests can be stored: the gateway is not stopping, and the log is connected, stores records
and has room."""

import anyio
from anyio import to_thread

from events.log import Log
from rift.gateway.asgi.errors import HTTPError, retry_after
from rift.gateway.state import GatewayConfig
from rift.gateway.streams.log_health import LogHealth

# New requests are rejected below this room: it holds 64 requests of 8 MB, and all their answers.
ROOM_BYTES_MIN = 64 * 1024 * 1024

RESERVE_CHECK_S = 0.5


class LogRoom:
    def __init__(self, log: Log, config: GatewayConfig, health: LogHealth, stopping: anyio.Event) -> None:
        self.health = health
        self._log = log
        self._reserve = config.reserve
        self._is_reserved = self._reserve is None or self._reserve.is_whole()
        self._stopping = stopping

    async def watch_reserve(self) -> None:
        """Check the reserve every RESERVE_CHECK_S, in a thread: a disk on a network may not answer."""
        while self._reserve is not None:
            await anyio.sleep(RESERVE_CHECK_S)
            self._is_reserved = await to_thread.run_sync(self._reserve.is_whole, abandon_on_cancel=True)

    def check(self) -> None:
        """Raise HTTPError (503) if nothing new can be stored."""
        if self._stopping.is_set():
            message = "this gateway is stopping; try again"
            raise HTTPError(503, message, code="gateway_stopping", headers=retry_after(1))
        if not self._is_reserved:
            message = "the disk of the log is full or read-only; try again later"
            raise HTTPError(503, message, code="log_full", headers=retry_after(60))
        if not self._log.is_connected:
            message = "the log does not answer; try again"
            raise HTTPError(503, message, code="log_unavailable", headers=retry_after(2))
        if not self.health.is_writable:
            message = f"the log has stored nothing for {self.health.silent_s:.0f} s; try again later"
            raise HTTPError(503, message, code="log_unavailable", headers=retry_after(5))
        if self.health.room_bytes is not None and self.health.room_bytes <= ROOM_BYTES_MIN:
            message = "the log is nearly full; try again later"
            raise HTTPError(503, message, code="log_full", headers=retry_after(60))
