"""A fresh warehouse from the archive: common requests in SQL, all others through the fold.

A common request is accepted, started once, gets its tokens in order and is finished by the same attempt. SQL
settles such requests as sets, some segments at a time. All other events of requests, the book and the fleet
go through the fold in their order. Both give the same rows, because a request's rows follow from its own
events and its price alone. Groups are the exception, and the fold handles all of them.

The file appears when it is complete. The rules are in the fold, and SQL repeats them for common requests
only. The control process switches to the new file.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

from events import redaction, schema, subjects
from events.log import Stored
from events.pricing import CHARGEABLE
from replay.archive.archive import Archive
from replay.archive.manifest import Manifest, file_name
from replay.facts.fold import Batch, Position, Read
from replay.facts.rows import SegmentRow
from replay.warehouse.fact_tables import FactTables
from replay.warehouse.warehouse import ProjectionStopped, Warehouse, WarehouseError

# Bytes of event files in one window, about 600,000 short requests. DuckDB writes row groups that a window
# leaves half full twice, so few windows are better; one takes half of DuckDB's memory when unpacked.
WINDOW_BYTES = 64 << 20
# Events in one batch for the fold.
BATCH_EVENTS = 20_000
# Replaces settled events in a record; every fold ignores it.
SETTLED = schema.LaneReported(lane="")


def rebuild(archive: Archive, path: Path, *, book: Iterable[Sequence[Stored]] = ()) -> None:
    """Write a warehouse of the archive to `path`, which must not exist.

    `book` are the records of the book in the log, in batches, because requests may have been admitted under
    entries that are not archived yet. Raises ArchiveDamaged if files differ from their manifests or from the
    segments that the book names, BookBehind, ProjectionStopped, WarehouseError, DiskRefused.
    """
    if path.exists():
        raise WarehouseError(f"{path} exists already")
    part = path.with_name(f"{path.name}.part")
    for leftover in (part, part.with_name(f"{part.name}.wal")):
        leftover.unlink(missing_ok=True)
    archive.check(subjects.BOOK)
    with closing(Warehouse.open(part, reading=archive.folder)) as warehouse:
        _fold_all(warehouse, archive, subjects.BOOK)
        for messages in book:
            warehouse.apply(subjects.BOOK, messages)
        with warehouse.transaction() as tables:
            anchors = _anchors(tables)
        manifests = {
            stream: archive.check(stream, anchors.get(stream, ()))
            for stream in sorted({*archive.streams(), *anchors})
        }
        for stream, sealed in manifests.items():
            if stream == subjects.FLEET:
                _fold_all(warehouse, archive, stream)
            elif stream != subjects.BOOK and sealed:
                _settle_all(warehouse, archive, sealed)
        warehouse.checkpoint()
    part.rename(path)


def _fold_all(warehouse: Warehouse, archive: Archive, stream: str) -> None:
    for records in archive.records(stream):
        warehouse.apply_batch(Batch(stream, records))


def _anchors(tables: FactTables) -> dict[str, list[schema.SegmentSealed]]:
    """Return the sealed segments that the book names, by stream."""
    anchors: dict[str, list[schema.SegmentSealed]] = defaultdict(list)
    for stream, first, last, manifest, *_ in tables.rows(SegmentRow):
        anchors[stream].append(
            schema.SegmentSealed(id="", stream=stream, first=first, last=last, manifest=manifest)
        )
    return anchors


def _settle_all(warehouse: Warehouse, archive: Archive, manifests: Sequence[Manifest]) -> None:
    """Enter all segments of one shard."""
    windows = list(_windows(manifests))
    try:
        with warehouse.transaction() as tables:
            for name in ("archive/macros", "rebuild/tables", "rebuild/macros"):
                tables.run(name)
            for window in windows:
                _settle(tables, archive, window, is_last=window is windows[-1])
    except ProjectionStopped:
        # Nothing after the record that stops the fold may be entered; the fold knows what precedes it.
        _fold_all(warehouse, archive, manifests[0].stream)


def _settle(tables: FactTables, archive: Archive, window: Sequence[Manifest], *, is_last: bool) -> None:
    stream = window[0].stream
    fold = tables.fold
    attempts = (attempt for request in fold.open for attempt in fold.lives[request].seen)
    parameters = {
        "stream": stream,
        "first": window[0].first,
        "records": [str(archive.path(manifest, "records")) for manifest in window],
        "events": [str(archive.path(manifest, "events")) for manifest in window],
        "book": fold.position(subjects.BOOK).sequence,
        "chargeable": sorted(CHARGEABLE),
        "is_last": is_last,
        "known": [*fold.open, *attempts],
    }
    for name in ("add_segments", "settle_requests", "keep_unsettled"):
        tables.run(f"rebuild/{name}", parameters)
    for batch in _remaining(tables, stream):
        _fold_part(tables, batch)
    tables.advance(stream, Position(window[-1].last, window[-1].at_ns))


def _remaining(tables: FactTables, stream: str) -> Iterator[Batch]:
    """Yield the events that SQL has not settled, each at its place in its record."""
    after = -1
    while rows := tables.fetch("from rest where pos > ? order by pos limit ?", [after, BATCH_EVENTS]):
        records: list[Read] = []
        for (sequence, at_ns, subject), group in groupby(rows, key=lambda row: row[1:4]):
            events: list[Any] = []
            for *_, place, text in group:
                events += [SETTLED] * (place - len(events))
                events.append(redaction.decode(text))
            records.append(Read(Stored(subject, sequence, at_ns, b""), events))
        yield Batch(stream, records)
        after = rows[-1][0]


def _fold_part(tables: FactTables, batch: Batch) -> None:
    """Fold some events of a window. They may precede events of other requests that were folded before."""
    known = tables.look_up(batch)
    tables.fold.positions.pop(batch.stream, None)
    changes = tables.apply(batch, known)
    if changes.stop is not None:
        raise ProjectionStopped(batch.stream, changes.stop)


def _windows(manifests: Sequence[Manifest]) -> Iterator[list[Manifest]]:
    window: list[Manifest] = []
    held = 0
    for manifest in manifests:
        window.append(manifest)
        held += manifest.files[file_name(manifest.first, "events")].bytes
        if held >= WINDOW_BYTES:
            yield window
            window = []
            held = 0
    if window:
        yield window
