"""A fresh warehouse from the archive: the common case in SQL, the rest through the fold, event by event.

A request whose life is the common one (accepted, started once, its tokens one after the other, finished by
that attempt) is settled set-wise, some segments at a time. All other events of requests, and all of the book
and the fleet, go through the fold in their order. Both give the same rows: a request's rows follow from its
own events and its price alone, but for groups, which the fold has all of.

The file appears when it is complete. What must not live here: what counts and what it costs (the fold; the
SQL says it for the common case only), and the switch to the new file (the control process).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

from events import redaction, schema, subjects
from events.log import Stored
from events.pricing import CHARGEABLE
from replay.archive import parquet
from replay.archive.archive import Archive
from replay.archive.manifest import Manifest, file_name
from replay.facts.fold import Batch, Changes, Position, Read
from replay.facts.request_rows import ITL_BOUNDS_NS
from replay.facts.rows import SegmentRow
from replay.warehouse.warehouse import Warehouse, WarehouseError

# Bytes of event files that are settled at once, of some 600,000 short requests. What a window leaves half
# full in the tables is written twice, so few are better; unpacked, one takes half of DuckDB's memory.
WINDOW_BYTES = 64 << 20
# Events that the fold is given at a time.
BATCH_EVENTS = 20_000
# Stands in a record for the events that are settled: it means nothing to any fold.
SETTLED = schema.LaneReported(lane="")


def rebuild(archive: Archive, path: Path, *, book: Iterable[Sequence[Stored]] = ()) -> None:
    """Write the warehouse of what is archived to `path`, where no file may be.

    `book` is what the log holds of the book, in batches: requests may have been admitted under entries
    that are not archived. Raises ArchiveDamaged where the files are not as they were sealed, or not what
    the book says was sealed, BookBehind, ProjectionStopped, WarehouseError.
    """
    if path.exists():
        raise WarehouseError(f"{path} exists already")
    part = path.with_name(f"{path.name}.part")
    for leftover in (part, part.with_name(f"{part.name}.wal")):
        leftover.unlink(missing_ok=True)
    archive.check(subjects.BOOK)
    with closing(_Rebuilding.open(part, reading=archive.folder)) as warehouse:
        warehouse.fold_all(archive, subjects.BOOK)
        for messages in book:
            warehouse.apply(subjects.BOOK, messages)
        anchors = warehouse.anchors()
        manifests = {
            stream: archive.check(stream, anchors.get(stream, ()))
            for stream in sorted({*archive.streams(), *anchors})
        }
        for stream, sealed in manifests.items():
            if stream == subjects.FLEET:
                warehouse.fold_all(archive, stream)
            elif stream != subjects.BOOK and sealed:
                warehouse.settle_all(archive, sealed)
    part.rename(path)


class _Stopped(Exception):
    """A record cannot be folded."""


class _Rebuilding(Warehouse):
    """A warehouse that also settles what is common."""

    def fold_all(self, archive: Archive, stream: str) -> None:
        for records in archive.records(stream):
            self.apply_batch(Batch(stream, records))

    def anchors(self) -> dict[str, list[schema.SegmentSealed]]:
        """What the book says was sealed, by stream."""
        found: dict[str, list[schema.SegmentSealed]] = defaultdict(list)
        for row in self._rows(SegmentRow):
            stream, first, last, manifest, *_ = row
            sealed = schema.SegmentSealed(id="", stream=stream, first=first, last=last, manifest=manifest)
            found[stream].append(sealed)
        return found

    def settle_all(self, archive: Archive, manifests: Sequence[Manifest]) -> None:
        """Enter all of a shard."""
        stream = manifests[0].stream
        windows = list(_windows(manifests))
        try:
            with self._transaction():
                self._run("archive/macros")
                self._run("rebuild/tables")
                for macro in _itl_macros():
                    self._writer.execute(macro)
                for window in windows:
                    self._settle(archive, window, is_last=window is windows[-1])
        except _Stopped:
            # Nothing behind that record may be entered: the fold alone knows what is before it.
            self.fold_all(archive, stream)

    def _settle(self, archive: Archive, window: Sequence[Manifest], *, is_last: bool) -> None:
        stream = window[0].stream
        told = {
            "stream": stream,
            "first": window[0].first,
            "records": [str(archive.path(manifest, "records")) for manifest in window],
            "events": [str(archive.path(manifest, "events")) for manifest in window],
            "book": self._fold.position(subjects.BOOK).sequence,
            "chargeable": sorted(CHARGEABLE),
            "is_last": is_last,
            "known": [
                *self._fold.open,
                *(a for request in self._fold.open for a in self._fold.lives[request].seen),
            ],
        }
        for name in ("window", "settle", "leave"):
            self._run(f"rebuild/{name}", told)
        for batch in self._rest(stream):
            self._fold_part(batch)
        end = Position(window[-1].last, window[-1].at_ns)
        self._fold.positions[stream] = end
        self._write(stream, Changes(end, [], set()))

    def _run(self, name: str, told: Mapping[str, Any] | None = None) -> None:
        for statement in self._writer.extract_statements(parquet.sql(name)):
            values = {key: (told or {})[key] for key in statement.named_parameters}
            self._writer.execute(statement, values or None)

    def _rest(self, stream: str) -> Iterator[Batch]:
        """Yield the events that are not settled, each at its place in its record."""
        after = -1
        while rows := self._writer.execute(
            "from rest where pos > ? order by pos limit ?", [after, BATCH_EVENTS]
        ).fetchall():
            records: list[Read] = []
            for (sequence, at_ns, subject), told in groupby(rows, key=lambda row: row[1:4]):
                events: list[Any] = []
                for *_, place, text in told:
                    events += [SETTLED] * (place - len(events))
                    events.append(redaction.decode(text))
                records.append(Read(Stored(subject, sequence, at_ns, b""), events))
            yield Batch(stream, records)
            after = rows[-1][0]

    def _fold_part(self, batch: Batch) -> None:
        """Fold some of the events of a window. They may stand before what was folded: they are others'."""
        ended = self._ended(self._fold.new_requests(batch))
        charged = self._charged(self._fold.groups(batch))
        self._fold.positions.pop(batch.stream, None)
        changes = self._fold.apply(batch, ended=ended, charged=charged)
        if changes.stop is not None:
            raise _Stopped
        self._write(batch.stream, changes)


def _itl_macros() -> Iterator[str]:
    """Yield the SQL that says in which bucket an interval is, and that counts how many each bucket has."""
    buckets = range(len(ITL_BOUNDS_NS) + 1)
    cases = " ".join(f"when gap < {bound} then {bucket}" for bucket, bound in enumerate(ITL_BOUNDS_NS))
    counts = ", ".join(f"len(list_filter(held, lambda bucket: bucket = {bucket}))" for bucket in buckets)
    yield f"create or replace temp macro itl_bucket(gap) as case {cases} else {buckets[-1]} end"
    yield f"create or replace temp macro itl_counts(held) as [{counts}]"


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
