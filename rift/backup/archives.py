"""Copies of archives: segments never change, so a copy adds what it lacks."""

from collections.abc import Sequence
from pathlib import Path

from replay.archive.folder import ArchiveFolder
from replay.archive.manifest import ArchiveDamaged, File, Manifest, file_name
from replay.disk import sync
from rift.backup import files
from rift.backup.files import BackupError
from rift.backup.manifest import ARCHIVE, Backup


class ArchiveCopy:
    """The archive of a backup. `files` are those of all segments, by their paths in the backup."""

    def __init__(self, folder: Path, earlier: Backup | None) -> None:
        self._folder = folder
        self._known = earlier.files if earlier else {}
        self.files: dict[str, File] = {}
        self.archived: dict[str, int] = {}
        self.copied = 0
        self.copied_bytes = 0

    def update(self, source: ArchiveFolder) -> None:
        """Copy the segments that the backup lacks.

        Raises ArchiveDamaged if a segment is not as its manifest says, BackupError if the backup has another
        one in its place, OSError.
        """
        for stream in source.streams():
            for folder in (self._folder / ARCHIVE, self._folder / ARCHIVE / stream):
                folder.mkdir(mode=0o700, exist_ok=True)
            for segment in source.manifests(stream):
                for name, file in files_of(segment):
                    self._update(source.folder, f"{stream}/{name}", file)
                self.archived[stream] = segment.last
            sync(self._folder / ARCHIVE / stream)

    def _update(self, source: Path, name: str, file: File) -> None:
        kept = f"{ARCHIVE}/{name}"
        path = self._folder / kept
        known = self._known.get(kept)
        if known is not None and known != file:
            raise BackupError(
                f"{path} is not the archive's {name}, which never changes: run `rift archive verify`, or "
                "name an empty folder"
            )
        if known is None or not path.is_file() or path.stat().st_size != file.bytes:
            copy_segment_file(source / name, path, file)
            self.copied += 1
            self.copied_bytes += file.bytes
        self.files[kept] = file


def files_of(segment: Manifest) -> list[tuple[str, File]]:
    """Return the names of a segment's files, with their sizes and digests, the manifest last."""
    encoded = segment.encoded
    return [*segment.files.items(), (file_name(segment.first), File(len(encoded), segment.sha256))]


def copy_segment_file(source: Path, path: Path, file: File) -> None:
    """Raises ArchiveDamaged if the copy is not `file`, OSError."""
    if not source.exists():
        raise ArchiveDamaged(f"{source} is missing")
    if files.copy(source, path) != file:
        raise ArchiveDamaged(f"{source} is not as it was sealed: its bytes have another SHA-256")


def merge(sources: Sequence[ArchiveFolder], target: Path) -> None:
    """Copy to `target` each stream from the archive that reaches furthest.

    Raises BackupError if the archives are not copies of one, or one is damaged; ArchiveDamaged, OSError.
    """
    target.mkdir(mode=0o700)
    for stream in sorted({stream for source in sources for stream in source.streams()}):
        chains = [(source, source.manifests(stream)) for source in sources]
        longest, segments = max(chains, key=lambda chain: len(chain[1]))
        for source, others in chains:
            if [segment.sha256 for segment in others] != [one.sha256 for one in segments[: len(others)]]:
                raise BackupError(
                    f"{source.folder} and {longest.folder} hold different segments of {stream}: they are of "
                    "two installations, or one was changed; `rift archive verify` tells"
                )
        (target / stream).mkdir(mode=0o700)
        for segment in segments:
            for name, file in files_of(segment):
                try:
                    copy_segment_file(longest.folder / stream / name, target / stream / name, file)
                except ArchiveDamaged as error:
                    raise BackupError(f"{error}; name another copy with --archive, or none") from error
        sync(target / stream)
    sync(target)
