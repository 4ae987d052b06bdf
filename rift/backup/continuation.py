"""Complete a restored log: add what only the archive holds, and open a shard for new requests.

Positions of the lost records are on invoices and in exports. New requests go to a new shard, because the
lengths of the lost streams are unknown; `unfinished.py` ends those of the old shards.
"""

from typing import NamedTuple

from events import shards, subjects
from events.jetstream import JetStream, snapshots
from replay.archive.archive import Archive
from rift.backup import gap, unfinished
from rift.backup.files import BackupError
from rift.backup.gap import Filled
from rift.backup.manifest import Backup
from rift.control.projection import continuity
from rift.data_dir import DataDir
from rift.settings import SHARDS_MAX, Settings


class Continued(NamedTuple):
    """The additions to the snapshots. `ended` counts the requests that a restore had to end, and `shard`
    accepts new requests."""

    filled: Filled
    ended: int
    shard: int


async def continue_log(
    log: JetStream, manifest: Backup, archive: Archive, installation: DataDir, settings: Settings, shard: int
) -> Continued:
    """Complete the log, build its database, and check both as a start does. The new shard has at least the
    number `shard`.

    Raises BackupError, LogError, ArchiveDamaged, WarehouseError.
    """
    # A shard may have been opened after the backup. The archive then has its records, or the book's entry.
    archived = max(map(subjects.shard_of, archive.streams()), default=0)
    await _ensure_streams(log, max(await shards.count(log), archived + 1), settings)
    if await log.last_sequence(subjects.SECRETS) < (last := manifest.streams[subjects.SECRETS].last):
        # A request that names a lost key must not find another one in its place.
        await snapshots.skip_to(log, subjects.SECRETS, last)
    filled = await gap.fill(log, archive)
    opened = max(await shards.count(log), archived + 1, shard)
    await _ensure_streams(log, opened + 1, settings)
    await shards.open_up_to(log, opened + 1, writer=unfinished.WRITER, requests_from=opened)
    ended = await unfinished.end(log, archive, installation, shard=opened)
    try:
        await continuity.check(log, archive, installation.database, secret=installation.secret())
    except continuity.WrongLog as error:
        raise BackupError(f"the backup does not hold together: {error}; use another one") from error
    return Continued(filled, ended, opened)


async def _ensure_streams(log: JetStream, wanted: int, settings: Settings) -> None:
    """Create the streams of so many shards. Raises BackupError, LogError."""
    if wanted > SHARDS_MAX:
        raise BackupError(f"a restore opens a shard for new requests, and the log has {SHARDS_MAX} already")
    await log.ensure_streams(
        shards=wanted,
        replicas=settings.log_replicas,
        max_bytes=settings.log_bytes_max,
        retention_days=settings.retention_days,
    )
