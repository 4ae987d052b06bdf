"""Whether the log stores records, and how much room it has, as this gateway sees both.

A broker whose disk is full or read-only answers every question and no append, so only appends count: the
lane's report every few seconds, and whatever else this gateway appends.

    stores nothing for UNWRITABLE_S although the broker answers    the disk: refuse new requests
    stores nothing for SILENT_S, and the broker is silent          frozen or cut off: the same
    stores nothing for LOG_OUTAGE_S                                end the streams of all clients
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import anyio

from events import subjects
from events.clock import now_s
from events.contracts import LOG_OUTAGE_S
from events.log import Log, LogError, OutcomeUnknown
from events.wakeup import Wakeup

logger = logging.getLogger(__name__)

# An append takes milliseconds. A sync that takes longer than this is a disk that cannot serve requests.
UNWRITABLE_S = 2.5

# A cluster elects a new leader in 5 s, and the append that was lost meanwhile is repeated 1.3 s later.
SILENT_S = 8.0

CHECK_S = 0.25
ASK_S = 1.0


class LogHealth:
    """`room_bytes` is the shard's room, None until it is known. `failed_at_s` is the last time at which the
    log was seen to store nothing, by the loop's clock."""

    def __init__(self, log: Log, shard: int) -> None:
        self.room_bytes: int | None = None
        self.failed_at_s = -math.inf
        self._log = log
        self._stream = subjects.shard_stream(shard)
        # When the newest question was asked that the broker has answered.
        self._answered_at_s = -math.inf
        # In the order of their begin: a set's order would make a simulation differ from run to run.
        self._waiting: dict[anyio.CancelScope, None] = {}
        self._checked = Wakeup()

    @property
    def silent_s(self) -> float:
        """For how long nothing has been stored although it was due."""
        return self._log.unwritable_s(self._stream)

    @property
    def is_writable(self) -> bool:
        silent_s = self.silent_s
        is_answering = self._answered_at_s > now_s() - silent_s
        return silent_s < (UNWRITABLE_S if is_answering else SILENT_S)

    @contextmanager
    def while_writable(self) -> Iterator[None]:
        """Raise OutcomeUnknown in the block as soon as the log is seen to store nothing."""
        with anyio.CancelScope() as scope:
            self._waiting[scope] = None
            try:
                yield
            finally:
                self._waiting.pop(scope, None)
        if scope.cancelled_caught:
            raise OutcomeUnknown(f"{self._stream} has stored nothing for {self.silent_s:.1f} s")

    def note_failure(self) -> None:
        """Note that the log stores nothing now."""
        self.failed_at_s = now_s()

    async def wait_writable(self) -> None:
        """Return once the log stores records; at once if it does."""
        while not self.is_writable:
            await self._checked.wait()

    async def ask(self) -> None:
        """Ask for the room for as long as the gateway lives."""
        while True:
            asked_at_s = now_s()
            with suppress(LogError):
                self.room_bytes = await self._log.room_bytes(self._stream)
                self._answered_at_s = asked_at_s
            await anyio.sleep(ASK_S)

    async def watch(self, end_streams: Callable[[], None]) -> None:
        """Check the log for as long as the gateway lives. During an outage, call `end_streams` again and
        again: a client may resume meanwhile."""
        was_writable = True
        while True:
            # A log that stores records cannot be unwritable sooner.
            sooner_s = UNWRITABLE_S - self.silent_s if was_writable else 0.0
            await anyio.sleep(max(CHECK_S, sooner_s))
            if not (is_writable := self.is_writable):
                self.note_failure()
                for scope in self._waiting:
                    scope.cancel()
            if was_writable and not is_writable:
                logger.error(
                    "%s has stored nothing for %.1f s, so new requests are refused. If the broker runs, its "
                    "disk may be full or read-only, or it refuses this process (`Authorization Violation`)",
                    self._stream,
                    self.silent_s,
                )
            elif is_writable and not was_writable:
                logger.warning("%s stores records again, so requests are accepted again", self._stream)
            was_writable = is_writable
            if self.silent_s > LOG_OUTAGE_S:
                end_streams()
            self._checked.set()
