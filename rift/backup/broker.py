"""The broker that a log is restored into."""

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import anyio
from anyio import to_thread

from events import subjects
from events.codec import RESTORE_WRITER
from events.jetstream import JetStream, connect
from replay.disk import sync
from rift import nats_server, startup
from rift.backup.files import BackupError
from rift.backup.manifest import Backup
from rift.broker.roles import ADMIN
from rift.broker.secret_files import write_secret
from rift.data_dir import DataDir
from rift.supervisor import Child, Guard, Parent

MB = 1_000_000

# A broker that stops writes what it has buffered.
STOP_S = 120.0

# A sync for each record would take an hour for ten million. The files are synced once, at the end.
EACH_RECORD = "sync_interval: always"
ONCE = "sync_interval: 1h"


class Target(NamedTuple):
    """Where to restore to: a data folder, and the address of a broker, None for the folder's own. `replicas`
    are the copies of the log in another broker, None for as many as the backup's settings say."""

    installation: DataDir
    address: nats_server.Address | None
    replicas: int | None = None


def check_room(target: Target, saved: Backup, *, shard: int) -> None:
    """Raise BackupError if the folder's broker would refuse the streams: it reserves all they may grow to."""
    if target.address is not None:
        return
    sizes = [max(0, int(saved.streams[name].config["max_bytes"])) for name in saved.streams]
    shards = len([name for name in saved.streams if subjects.shard_stream(subjects.shard_of(name)) == name])
    # That of the new shard comes first.
    sizes += max(1, shard + 1 - shards) * sizes[:1]
    needed = sum(file.bytes for file in saved.files.values()) + nats_server.free_bytes_for(sum(sizes))
    folder = target.installation.folder.absolute()
    parent = next(path for path in (folder, *folder.parents) if path.is_dir())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise BackupError(
            f"the restored log needs {-(-needed // MB)} MB free on the disk of {parent}, which has "
            f"{free // MB}: its streams may grow to {sum(sizes) // MB} MB (log_bytes_max), and the broker "
            "takes three quarters of the free space; name a folder on a larger disk"
        )


@asynccontextmanager
async def opened(target: Target, notify: Callable[[str], None]) -> AsyncIterator[JetStream]:
    """Connect to the broker, which runs meanwhile if it is the folder's. Raises LogError, DataDirError."""
    if target.address is None:
        async with _embedded(target.installation, notify) as log:
            yield log
        return
    log = await connect(target.address.url, target.address.access(ADMIN), name=RESTORE_WRITER)
    try:
        yield log
    finally:
        await log.close()


@asynccontextmanager
async def _embedded(installation: DataDir, notify: Callable[[str], None]) -> AsyncIterator[JetStream]:
    """Run the folder's broker, and connect to it. Afterwards it is stopped, and its files are on disk."""
    installation.nats.mkdir(mode=0o700, exist_ok=True)
    nats_server.configure(installation.nats)
    file = installation.nats / "nats.conf"
    configuration = file.read_text()
    assert EACH_RECORD in configuration, "the embedded broker syncs each record"
    write_secret(file, configuration.replace(EACH_RECORD, ONCE).rstrip())
    guard = Guard()
    parent = Parent(installation.logs, guard, notify)
    child = Child("nats", lambda: nats_server.command(installation.nats), parent)
    try:
        child.start()
        log = await startup.connected(installation, ADMIN)
        try:
            yield log
        finally:
            await log.close()
    finally:
        with anyio.CancelScope(shield=True):
            await child.stop(STOP_S)
            guard.dismiss()
            write_secret(file, configuration.rstrip())
    await to_thread.run_sync(_sync_all, installation.nats)


def _sync_all(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
