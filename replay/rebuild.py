"""A fresh warehouse from the archive."""

from pathlib import Path

from events import subjects
from replay.archive import Archive
from replay.fold import Batch
from replay.warehouse import Warehouse


def rebuilt(path: Path, archive: Archive) -> Warehouse:
    warehouse = Warehouse.open(path)
    for stream in sorted(archive.streams(), key=lambda name: name != subjects.BOOK):
        for batch in archive.records(stream):
            warehouse.apply_batch(Batch(stream, batch))
    return warehouse
