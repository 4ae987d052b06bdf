"""Save the streams of a log as snapshots, and create streams from them."""

from collections.abc import Callable
from pathlib import Path

from msgspec.structs import replace

from events import shards, subjects
from events.jetstream import JetStream, Snapshot, snapshots
from events.log import LogError
from replay.archive.manifest import File
from rift.backup import files
from rift.backup.files import BackupError
from rift.backup.manifest import Backup, numbers


async def save(log: JetStream, folder: Path) -> tuple[dict[str, Snapshot], dict[str, File]]:
    """Write a snapshot of each stream to `folder`, and return what it holds, and each file's digest.

    Raises BackupError, LogError, OSError.
    """
    streams: dict[str, Snapshot] = {}
    saved: dict[str, File] = {}
    opened = await shards.count(log)
    # A key is stored before the request that uses it, and the book names what was stored before its entry.
    for stream in (
        *map(subjects.shard_stream, range(opened)),
        *(subjects.FLEET, subjects.KEYS, subjects.SECRETS, subjects.BOOK),
    ):
        name = f"{stream}.snapshot"
        with files.writing(folder / name) as output:
            streams[stream] = await snapshots.save(log, stream, output.write)
            saved[name] = output.finish()
    if await shards.count(log) != opened:
        raise BackupError("a shard was opened during the backup, which lacks its stream: run it again")
    return streams, saved


async def check_broker(log: JetStream, manifest: Backup) -> None:
    """Raise BackupError if the broker holds a log already, or may not understand the snapshots."""
    if taken := sorted(name for name in await log.streams() if name in manifest.streams):
        raise BackupError(
            f"the broker at {log.server_address} holds {', '.join(taken)} already: a restore needs a broker "
            "without a log of Rift (if an unfinished restore left these streams, and no process uses them, "
            "remove them: rift/broker/README.md has the command)"
        )
    if numbers(log.server_version)[:2] < numbers(manifest.broker)[:2]:
        raise BackupError(
            f"the backup was made with nats-server {manifest.broker}, and this one is {log.server_version}: "
            f"install {manifest.broker} or newer"
        )


async def restore(
    log: JetStream, backup: Path, manifest: Backup, replicas: int, notify: Callable[[str], None]
) -> None:
    """Create each stream of the backup from its snapshot, if the manifest names the file.

    Raises BackupError, LogError.
    """
    for stream, snapshot in manifest.streams.items():
        file = manifest.snapshot_file(stream)
        if file not in manifest.files:
            continue
        placed = replace(snapshot, config=snapshot.config | {"num_replicas": replicas})
        try:
            last = await snapshots.restore(log, placed, files.pieces(backup / file))
        except LogError as error:
            if replicas == 1:
                raise
            raise BackupError(
                f"{error}; {replicas} copies of the log need as many servers: for fewer, repeat the restore "
                "with --log-replicas"
            ) from error
        if last != snapshot.last:
            raise BackupError(f"{stream} was restored up to {last}, and its backup ends at {snapshot.last}")
        notify(f"{stream}: restored up to {last}")
