"""The files of the archive: names, manifests, and durable writes."""

import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from events.schema import SegmentSealed
from replay.disk import sync
from replay.errors import ReplayError

VERSION = 1
# Files are hashed in pieces of this size.
PIECE_BYTES = 1 << 20


class ArchiveError(ReplayError):
    """The operation failed and nothing was sealed; the message names the remedy."""


class ArchiveDamaged(ArchiveError):
    """A file of the archive was changed, lost or truncated; the message names it."""


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One segment. `at_ns` is the time of its last record, `previous` the hash of the manifest before it."""

    version: int
    stream: str
    first: int
    last: int
    at_ns: int
    records: int
    events: int
    files: dict[str, File]
    root: str
    previous: str

    @property
    def encoded(self) -> bytes:
        """Return the exact bytes of the manifest's file."""
        return msgspec.json.encode(self)

    @property
    def text(self) -> str:
        return self.encoded.decode()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.encoded).hexdigest()


def anchor_of(stream: str, manifest: Manifest) -> SegmentSealed:
    """Return the entry of the book that names a stream's segment, without a signature."""
    return SegmentSealed(
        id=f"segment.{stream}.{manifest.first}",
        stream=stream,
        first=manifest.first,
        last=manifest.last,
        manifest=manifest.sha256,
    )


def changed_files(folder: Path, files: Mapping[str, File], *, once: str) -> Iterator[str]:
    """Yield a sentence for each file that cannot be read or has changed since it was `once` written."""
    for name, file in files.items():
        path = folder / name
        try:
            # A reader of a pipe, or of a link to a device, would wait for ever.
            measured = measure(path) if path.is_file() or not path.exists() else None
        except OSError as error:
            yield f"{path} cannot be read: {error.strerror}"
            continue
        if measured != file:
            yield f"{path} is not as it was {once}: its bytes have another SHA-256"


def file_name(first: int, suffix: str | None = None) -> str:
    return f"{first:020d}.{suffix}.parquet" if suffix else f"{first:020d}.json"


def read_manifest(path: Path) -> Manifest:
    """Return a segment's manifest. Raises ArchiveDamaged, also if one of the segment's files is a pipe, at
    which a reader would wait for ever."""
    try:
        _check_file(path)
        data = path.read_bytes()
        manifest = msgspec.json.decode(data, type=Manifest)
    except OSError as error:
        raise ArchiveDamaged(f"{path} cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArchiveDamaged(f"{path} is no manifest: {error}") from error
    named = (path.parent.name, file_name(manifest.first), VERSION)
    if manifest.encoded != data or (manifest.stream, path.name, manifest.version) != named:
        raise ArchiveDamaged(f"{path} is no manifest as it was written")
    for name in manifest.files:
        # Its reader reports one that is missing.
        try:
            with suppress(OSError):
                _check_file(path.with_name(name))
        except ValueError as error:
            raise ArchiveDamaged(f"{path} names a file {name!r}, which is no name") from error
    return manifest


def _check_file(path: Path) -> None:
    """Raises ArchiveDamaged, OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ArchiveDamaged(f"{path} is not a file: restore the archive from a backup")


def measure(path: Path) -> File:
    hashed = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            hashed.update(piece)
            size += len(piece)
    return File(size, hashed.hexdigest())


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: two sealing processes would overwrite each other's files."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ArchiveError(f"another process is sealing into {folder}") from error
    finally:
        os.close(handle)


def create(path: Path, data: bytes) -> None:
    """Create a file atomically and durably. Raises ArchiveError if it exists."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    sync(part)
    try:
        os.link(part, path)
    except FileExistsError as error:
        raise ArchiveError(f"{path} exists already") from error
    part.unlink()
    sync(path.parent)
