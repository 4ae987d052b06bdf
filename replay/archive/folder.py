"""Which segments an archive has, from the names of its files and its manifests.

A process that only compares the archive with the log, such as a gateway, reads no rows and loads no DuckDB.
"""

import re
from pathlib import Path

from replay.archive.manifest import Manifest, read_manifest

_STREAM = re.compile(r"RIFT_[A-Z0-9_]+")
_MANIFEST = re.compile(r"\d{20}\.json")


class ArchiveFolder:
    """The folder `archive/`; it may be missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def streams(self) -> list[str]:
        """Return the streams that have a segment."""
        if not self.folder.is_dir():
            return []
        named = sorted(path.name for path in self.folder.iterdir() if _STREAM.fullmatch(path.name))
        return [name for name in named if self.manifest_paths(name)]

    def manifests(self, stream: str) -> list[Manifest]:
        """Return the manifests of a stream in order. Raises ArchiveDamaged."""
        return [read_manifest(path) for path in self.manifest_paths(stream)]

    def last(self, stream: str) -> int:
        """Return the last sequence that is archived, 0 if none is. Raises ArchiveDamaged."""
        head = self.head(stream)
        return head.last if head else 0

    def head(self, stream: str) -> Manifest | None:
        """Return the last manifest of a stream, None without a segment. Raises ArchiveDamaged."""
        paths = self.manifest_paths(stream)
        return read_manifest(paths[-1]) if paths else None

    def manifest_paths(self, stream: str) -> list[Path]:
        folder = self.folder / stream
        if not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if _MANIFEST.fullmatch(path.name))

    def newest(self) -> dict[str, int]:
        """Return the first sequence of the last segment of each stream, from the names of the files."""
        return {stream: int(self.manifest_paths(stream)[-1].stem) for stream in self.streams()}
