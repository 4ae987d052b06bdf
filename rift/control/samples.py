"""What the metrics of a control process show of the log and of its disks, asked for now and then.

A scrape must not wait for the broker or for a disk, so it shows the last sample and its age.
"""

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import anyio
import anyio.to_thread

from events.clock import now_s
from events.log import Log, LogError, worst_states
from rift.log_disk.reserve import Reserve

logger = logging.getLogger(__name__)

# Three questions to the broker for each stream, as seldom as Prometheus usually scrapes.
SAMPLE_S = 10.0

# The heads of a stream that are remembered while its projection is behind: an hour of them; then every second
# one is forgotten, so the age of the oldest stays exact.
HEADS_MAX = 360


class DiskSample(NamedTuple):
    """Bytes of the DuckDB file, and of the log's disk if it is this machine's: free ones, and whether its
    reserve is whole."""

    database_bytes: int
    free_bytes: int | None = None
    reserve_is_whole: bool | None = None


class Heads:
    """The last sequences of a stream and when each was seen, unless the projection has applied them."""

    def __init__(self) -> None:
        self.last = 0
        self._seen: deque[tuple[int, float]] = deque()

    def see(self, last: int, at_s: float) -> None:
        if last > self.last:
            self.last = last
            self._seen.append((last, at_s))
        if len(self._seen) > HEADS_MAX:
            self._seen = deque(list(self._seen)[::2])

    def waited_s(self, applied: int, at_s: float) -> float:
        """Return for how long the oldest head that is not applied has waited; 0 if all are applied."""
        while self._seen and self._seen[0][0] <= applied:
            self._seen.popleft()
        return at_s - self._seen[0][1] if self._seen else 0.0


class Samples:
    def __init__(self, log: Log, database: Path, reserve: Reserve | None) -> None:
        self.heads: dict[str, Heads] = {}
        self.room_bytes: dict[str, int] = {}
        self.servers: Mapping[str, str] = {}
        self.disk = DiskSample(0)
        self._log = log
        self._database = database
        self._reserve = reserve
        self._sampled_at_s = now_s()

    @property
    def age_s(self) -> float:
        """The age of the last complete sample."""
        return now_s() - self._sampled_at_s

    async def run(self, streams: Mapping[str, str]) -> None:
        """Sample until cancelled. `streams` may grow."""
        while True:
            try:
                await self.take(list(streams))
            except (LogError, OSError) as error:
                logger.info("metrics keep their last figures: %s", error)
            await anyio.sleep(SAMPLE_S)

    async def take(self, streams: Iterable[str]) -> None:
        """Take one sample. Raises LogError, OSError."""
        servers = []
        for stream in streams:
            last = await self._log.last_sequence(stream)
            self.heads.setdefault(stream, Heads()).see(last, now_s())
            self.room_bytes[stream] = await self._log.room_bytes(stream)
            servers.append(await self._log.stream_servers(stream))
        self.servers = worst_states(servers)
        self.disk = await anyio.to_thread.run_sync(self._disk, abandon_on_cancel=True)
        self._sampled_at_s = now_s()

    def _disk(self) -> DiskSample:
        files = (self._database, self._database.with_name(f"{self._database.name}.wal"))
        size = sum(file.stat().st_size for file in files if file.exists())
        if self._reserve is None:
            return DiskSample(size)
        return DiskSample(size, self._reserve.free_bytes, self._reserve.is_whole())
