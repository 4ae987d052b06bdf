"""Make a data folder and a log from a backup.

    1. check     the manifest, and the digest of every file
    2. files     secret, first key, settings and archive, into a folder that says it is not complete
    3. streams   each from its snapshot, into a broker that has none
    4. log       what the archive knows beyond the snapshots, and a shard for new requests (`continuation.py`)
    5. database  the projection, from the archive and the book
    6. check     as at every start

The folder's version is written last. A restore that was interrupted is begun again.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from anyio import to_thread
from msgspec.structs import replace

from events import subjects
from replay.archive.archive import Archive
from replay.archive.folder import ArchiveFolder
from rift import settings as settings_files
from rift.backup import archives, broker, continuation, files, manifest, streams
from rift.backup.broker import Target
from rift.backup.continuation import Continued
from rift.backup.files import BackupError
from rift.backup.manifest import ARCHIVE, Backup
from rift.clock import now_ns
from rift.data_dir import RESTORING, VERSION, DataDir

SHARDS_LINE = re.compile(r"^shards\s*=\s*\d+", re.MULTILINE)


class Restored(NamedTuple):
    manifest: Backup
    continued: Continued
    has_content_keys: bool


async def restore(
    backup: Path,
    target: Target,
    notify: Callable[[str], None],
    *,
    surviving: Path | None = None,
    shard: int = 0,
) -> Restored:
    """Restore a backup, and what a `surviving` archive knows beyond it. The number of the shard for new
    requests is at least `shard`.

    Raises BackupError, ArchiveDamaged, LogError, DataDirError, DiskRefused, OSError.
    """
    saved = manifest.read(backup)
    # An erased key must not come back from an old backup.
    key_file = saved.snapshot_file(subjects.SECRETS)
    has_content_keys = now_ns() < saved.content_keys_until_ns
    if not has_content_keys:
        saved = replace(saved, files={name: one for name, one in saved.files.items() if name != key_file})
    if surviving is not None and not ArchiveFolder(surviving).streams():
        raise BackupError(f"{surviving} holds no segment of an archive: name the folder `archive` itself")
    folder = target.installation.folder
    _check_empty(target.installation)
    notify(f"checking {len(saved.files)} files of {backup}")
    for problem in await to_thread.run_sync(lambda: list(manifest.damage(backup, saved))):
        raise BackupError(f"{problem}; nothing was restored: use another copy of the backup")
    broker.check_room(target, saved, shard=shard)
    if target.address is not None:
        async with broker.opened(target, notify) as log:
            await streams.check_broker(log, saved)
    with files.locked(folder):
        files.write(folder / "version", RESTORING.encode())
        try:
            await to_thread.run_sync(_write_files, backup, saved, target.installation, surviving)
            continued = await _restore_log(backup, saved, target, notify, shard)
        except BaseException:  # also if it is interrupted
            notify(f"the restore did not finish: remove {folder} before you repeat it")
            raise
        files.write(folder / "version", f"{VERSION}\n".encode())
    return Restored(saved, continued, has_content_keys)


def _check_empty(installation: DataDir) -> None:
    """Raises BackupError, DataDirError."""
    folder = installation.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        # It may hold what an interrupted restore left.
        installation.check()
        raise BackupError(
            f"{folder} is not an empty folder, and a restore replaces nothing: name one with --data that is "
            "empty or does not exist"
        )


def _write_files(backup: Path, saved: Backup, installation: DataDir, surviving: Path | None) -> None:
    for name in ("secret", "signing.key", "dev.key", "rift.toml"):
        if (path := f"{saved.run}/{name}") in saved.files:
            files.copy(backup / path, installation.folder / name)
    installation.logs.mkdir(mode=0o700)
    sources = [ArchiveFolder(folder) for folder in (backup / ARCHIVE, surviving) if folder is not None]
    archives.merge(sources, installation.archive)


async def _restore_log(
    backup: Path, saved: Backup, target: Target, notify: Callable[[str], None], shard: int
) -> Continued:
    installation = target.installation
    file = installation.folder / "rift.toml"
    settings = settings_files.load(file if file.exists() else None, {})
    replicas = 1 if target.address is None else target.replicas
    if replicas is not None:
        settings = replace(settings, log_replicas=replicas)
    archive = Archive(installation.archive, key=installation.archive_key())
    async with broker.opened(target, notify) as log:
        await streams.check_broker(log, saved)
        try:
            await streams.restore(log, backup, saved, settings.log_replicas, notify)
            notify("completing the log, and building the database")
            continued = await continuation.continue_log(log, saved, archive, installation, settings, shard)
        except BaseException:
            if target.address is not None:
                made = ", ".join(saved.streams)
                notify(
                    f"it may have left streams in the broker at {target.address.url}: remove {made} and any "
                    "other RIFT_… that is there (rift/broker/README.md has the command)"
                )
            raise
        if settings.shards is not None and settings.shards <= continued.shard:
            # No process starts with fewer than the log has.
            text = SHARDS_LINE.sub(f"shards = {continued.shard + 1}", file.read_text())
            files.write(file, text.encode())
    return continued
