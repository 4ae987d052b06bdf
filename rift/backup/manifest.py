"""The manifest and the files of a backup. A folder without a manifest holds no backup.

backup.json   this manifest, written last and in one step
archive/      the archive; each run adds the segments that are new
TIME/         the rest, of one run: snapshots of the streams, `secret`, `signing.key`, `dev.key`, `rift.toml`
"""

import hashlib
import hmac
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from events.jetstream import Snapshot
from replay.archive.manifest import File, changed_files
from rift import __version__
from rift.backup import files
from rift.backup.files import BackupError

Decoded = TypeVar("Decoded")

# Raise it with a change after which an older Rift would misread a backup.
FORMAT = 1

MANIFEST = "backup.json"
ARCHIVE = "archive"
RUN = re.compile(r"\d{8}T\d{6}Z(-\d+)?")


class Backup(msgspec.Struct, frozen=True):
    """One complete backup. `run` is the folder of its files; `files` are all of them, with their paths.

    `archived` is the last archived sequence of each stream. `installation` tells installations apart.
    `sha256` is the digest of the manifest's own bytes without these digits.
    """

    format: int
    rift: str
    broker: str
    layout: str
    installation: str
    created_at_ns: int
    run: str
    content_keys_until_ns: int
    streams: dict[str, Snapshot]
    archived: dict[str, int]
    files: dict[str, File]
    sha256: str = ""

    @property
    def positions(self) -> dict[str, int]:
        """The last sequence that the backup holds of each stream."""
        return {name: snapshot.last for name, snapshot in self.streams.items()}

    def snapshot_file(self, stream: str) -> str:
        return f"{self.run}/{stream}.snapshot"


class _Head(msgspec.Struct, frozen=True):
    """The part of a manifest that every version has."""

    format: int
    rift: str


def installation_of(secret: bytes) -> str:
    return hmac.new(secret, b"backup", hashlib.sha256).hexdigest()


def write(folder: Path, complete: Backup) -> Backup:
    """Write a manifest in one step, and return it with its digest."""
    digested = replace(complete, sha256=hashlib.sha256(_encoded(complete)).hexdigest())
    files.write(folder / MANIFEST, _encoded(digested))
    return digested


def read(folder: Path) -> Backup:
    """Return the manifest of a backup that this Rift can read. Raises BackupError."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BackupError(
            f"{folder} holds no complete backup: there is no {MANIFEST}; name the folder that `rift backup` "
            "wrote to"
        ) from error
    except OSError as error:
        raise BackupError(f"{path} cannot be read: {error.strerror}") from error
    head = _decoded(path, data, _Head)
    if head.format > FORMAT or numbers(head.rift) > numbers(__version__):
        raise BackupError(
            f"{folder} was made by Rift {head.rift}, which is newer than this Rift {__version__}: restore it "
            f"with Rift {head.rift}"
        )
    backup = _decoded(path, data, Backup)
    if hashlib.sha256(data.replace(backup.sha256.encode(), b"")).hexdigest() != backup.sha256:
        raise BackupError(
            f"{path} is damaged: its bytes have another SHA-256; use another copy of the backup"
        )
    return backup


def damage(folder: Path, manifest: Backup, *, left_out: str = "") -> Iterator[str]:
    """Yield each file that is not as it was saved, except `left_out`."""
    files = {name: file for name, file in manifest.files.items() if name != left_out}
    yield from changed_files(folder, files, once="saved")


def numbers(version: str) -> list[int]:
    """Return a version for comparisons."""
    return [int(part) for part in re.findall(r"\d+", version)][:3]


def _encoded(backup: Backup) -> bytes:
    return msgspec.json.format(msgspec.json.encode(backup))


def _decoded(path: Path, data: bytes, kind: type[Decoded]) -> Decoded:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BackupError(f"{path} is damaged: {error}; use another copy of the backup") from error
