"""Make restored streams a log that continues: nothing that was known before has a position of what comes now.

It holds what the archive knows beyond the snapshots (`gap.py`), and has a new shard for new requests: nobody
knows what the lost ends of the others held, and so which of their positions invoices and exports name.
"""

from collections.abc import Mapping
from typing import NamedTuple

from anyio import to_thread

from events import shards, subjects
from events.jetstream import JetStream, snapshots
from replay.archive.archive import Archive
from rift.backup import gap
from rift.backup.files import BackupError
from rift.backup.manifest import Backup
from rift.control.projection import continuity
from rift.control.projection.catch_up import rebuilt
from rift.data_dir import DataDir
from rift.settings import SHARDS_MAX, Settings

OPEN = "select request_id from requests where finished_position is null order by request_id"


class Continued(NamedTuple):
    """What was added to the snapshots: records of the archive by stream, ends of requests, and the shard that
    accepts new requests."""

    filled: Mapping[str, int]
    ended: int
    shard: int


async def continue_log(
    log: JetStream, manifest: Backup, archive: Archive, installation: DataDir, settings: Settings
) -> Continued:
    """Make a log of the restored streams that nothing known can collide with, and its database.

    Raises BackupError, LogError, ArchiveDamaged, WarehouseError.
    """
    opened = await shards.count(log)
    if opened >= SHARDS_MAX:
        raise BackupError(
            f"the log has {opened} shards, the most that it may have, and a restore opens another"
        )
    await log.ensure_streams(
        shards=opened + 1,
        replicas=settings.log_replicas,
        max_bytes=settings.log_bytes_max,
        retention_days=settings.retention_days,
    )
    if await log.last_sequence(subjects.SECRETS) < (last := manifest.streams[subjects.SECRETS].last):
        # A request that names a lost key must not find another one in its place.
        await snapshots.skip_to(log, subjects.SECRETS, last)
    filled = await gap.fill(log, archive)
    await gap.skip_claimed(log)
    await shards.open_up_to(log, opened + 1, writer=continuity.RESTORE_WRITER, requests_from=opened)
    warehouse = await rebuilt(log, archive, installation.database)
    try:
        [result] = await to_thread.run_sync(warehouse.read, (OPEN, []))
        await to_thread.run_sync(warehouse.checkpoint)
    finally:
        await to_thread.run_sync(warehouse.close)
    ended = await gap.end_open(log, [request for (request,) in result.rows], filled)
    try:
        await continuity.check(log, archive, installation.database, secret=installation.secret())
    except continuity.WrongLog as error:
        raise BackupError(f"the backup does not hold together: {error}; use another one") from error
    return Continued(filled, ended, opened)
