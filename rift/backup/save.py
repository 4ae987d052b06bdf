"""Make a backup while the service runs, or bring an earlier one up to date.

The streams are saved one after the other, the book last: it then names everything that requests refer to.
The archive comes after it, so it holds every segment that the book names. Where it reaches beyond a stream's
snapshot, a restore continues the stream from it (`gap.py`).
"""

import os
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from anyio import to_thread

from events import subjects
from events.contracts import SECOND_NS
from events.jetstream import JetStream
from replay.archive.folder import ArchiveFolder
from replay.disk import DiskRefused, naming, sync
from rift import __version__
from rift.backup import files, manifest, streams
from rift.backup.archives import ArchiveCopy
from rift.backup.files import BackupError
from rift.backup.manifest import ARCHIVE, FORMAT, MANIFEST, RUN, Backup
from rift.clock import now_ns
from rift.data_dir import VERSION, DataDir

DAY_NS = 24 * 3600 * SECOND_NS

# An erased content key stays readable in a copy of a backup at most this long. The log keeps prompts and
# answers for 7 days by default, so an older backup brings back little else.
CONTENT_KEYS_DAYS = 7


class Saved(NamedTuple):
    """A finished backup, and what this run wrote: files of the archive, and bytes in all."""

    manifest: Backup
    segment_files: int
    written_bytes: int


class Source(NamedTuple):
    """What to save. `settings` is the file of the settings, None if there is none."""

    log: JetStream
    installation: DataDir
    settings: Path | None


async def save(source: Source, folder: Path, *, content_keys_days: int = CONTENT_KEYS_DAYS) -> Saved:
    """Write a backup to `folder`, which is empty or holds an earlier one of this installation.

    The earlier one is complete until this one is. Raises BackupError, LogError, ArchiveError, DiskRefused,
    OSError.
    """
    _check_place(source.installation, folder)
    with files.locked(folder):
        earlier = _earlier(source.installation, folder)
        _remove_runs(folder, earlier)
        _remove_old_keys(folder, earlier)
        try:
            with naming(folder):
                return await _save(source, folder, earlier, content_keys_days)
        except DiskRefused as error:
            state = "no backup was made" if earlier is None else "the earlier backup stays complete"
            raise BackupError(
                f"{error}: {state}; a run needs room for a snapshot of the log beside the earlier one"
            ) from error
        finally:
            # Those of the earlier backup, or of this one if it failed.
            _remove_runs(folder, _earlier(source.installation, folder))


def _check_place(installation: DataDir, folder: Path) -> None:
    """Raise BackupError for a folder that would be lost with the installation, or that holds other files."""
    if folder.resolve().is_relative_to(installation.folder.resolve()):
        raise BackupError(
            f"{folder} is inside the data folder {installation.folder}, and would be lost with it: name a "
            "folder on another disk"
        )
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name not in (MANIFEST, f"{MANIFEST}.part", ARCHIVE) and not RUN.fullmatch(path.name):
            raise BackupError(
                f"{folder} holds {path.name}, which does not belong to a backup: name an empty folder"
            )


def _earlier(installation: DataDir, folder: Path) -> Backup | None:
    """Return the manifest of the backup in the folder. Raises BackupError if it is another installation's."""
    if not (folder / MANIFEST).exists():
        return None
    earlier = manifest.read(folder)
    if earlier.installation != manifest.installation_of(installation.secret()):
        raise BackupError(f"{folder} holds a backup of another installation: name another folder")
    return earlier


async def _save(source: Source, folder: Path, earlier: Backup | None, content_keys_days: int) -> Saved:
    log, installation, settings = source
    created_at_ns = now_ns()
    run = _new_run(folder, created_at_ns)
    snapshots, digests = await streams.save(log, folder / run)
    saved = {f"{run}/{name}": file for name, file in digests.items()}
    parts = {"secret": installation.folder / "secret", "dev.key": installation.first_key}
    parts["signing.key"] = installation.folder / "signing.key"
    if settings is not None:
        parts["rift.toml"] = settings
    for name, path in parts.items():
        with suppress(FileNotFoundError):
            saved[f"{run}/{name}"] = files.copy(path, folder / run / name)
    sync(folder / run)
    archive = ArchiveCopy(folder, earlier)
    await to_thread.run_sync(archive.update, ArchiveFolder(installation.archive))
    sync(folder)
    complete = Backup(
        format=FORMAT,
        rift=__version__,
        broker=log.server_version,
        layout=VERSION,
        installation=manifest.installation_of(installation.secret()),
        created_at_ns=created_at_ns,
        run=run,
        content_keys_until_ns=created_at_ns + content_keys_days * DAY_NS,
        streams=snapshots,
        archived=archive.archived,
        files=saved | archive.files,
    )
    complete = manifest.write(folder, complete)
    written = sum(file.bytes for file in saved.values()) + archive.copied_bytes
    return Saved(complete, archive.copied, written)


def _new_run(folder: Path, created_at_ns: int) -> str:
    """Make the folder of this run, and return its name."""
    name = time = f"{datetime.fromtimestamp(created_at_ns // SECOND_NS, UTC):%Y%m%dT%H%M%SZ}"
    count = 1
    while os.path.lexists(folder / name):
        count += 1
        name = f"{time}-{count}"
    (folder / name).mkdir(mode=0o700)
    return name


def _remove_runs(folder: Path, kept: Backup | None) -> None:
    """Remove the files of every run that the manifest does not name."""
    for path in folder.iterdir():
        if RUN.fullmatch(path.name) and (kept is None or path.name != kept.run):
            shutil.rmtree(path)


def _remove_old_keys(folder: Path, earlier: Backup | None) -> None:
    """Remove the content keys that a restore would leave out. This run may fail, and so may later ones."""
    if earlier is not None and now_ns() >= earlier.content_keys_until_ns:
        (folder / earlier.snapshot_file(subjects.SECRETS)).unlink(missing_ok=True)
