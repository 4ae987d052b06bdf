"""The archive: a permanent copy of the log without its content, in segments that can be verified.

A segment holds consecutive records of one stream: a Parquet file of the records, one of their events, and a
manifest, which is written last. A segment exists if and only if its manifest does. Each manifest holds the
SHA-256 of the one before it, so the last one covers all.

The control process decides when to seal and how far to trim; `parquet.py` reads and writes the rows.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from events import merkle, redaction
from events.log import Stored
from events.schema import SegmentSealed
from replay.archive.folder import ArchiveFolder
from replay.archive.manifest import (
    VERSION,
    ArchiveDamaged,
    ArchiveError,
    Manifest,
    alone,
    changed_files,
    create,
    file_name,
    measure,
    read_manifest,
)
from replay.archive.parquet import ROWS, Event, Record, Segments, SegmentUnreadable
from replay.disk import naming, sync
from replay.facts.fold import Read, decoded


class SealedRecord(NamedTuple):
    """One archived record; `events` are bare JSON."""

    sequence: int
    at_ns: int
    subject: str
    writer: str
    content: str
    events: Sequence[str]


SUFFIXES = ("records", "events", "content")


class Archive(ArchiveFolder):
    """The folder and the rows of its segments. One process seals; any process may read."""

    def __init__(self, folder: Path, *, key: bytes, content: bool = False) -> None:
        super().__init__(folder)
        self._key = key
        self._content = content

    # --- sealing ---------------------------------------------------------------------------------

    def seal(
        self, stream: str, messages: Iterable[Stored], *, last: int, quarantined: Container[int] = ()
    ) -> Manifest:
        """Archive all messages after the last archived one up to `last`, in order.

        A `quarantined` message that cannot be read is kept as the hash of its bytes. When this returns, the
        segment is on disk. DuckDB's limit bounds the memory.

        Raises ArchiveError, ArchiveDamaged, DiskRefused.
        """
        folder = self.folder / stream
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            sync(self.folder)
        with naming(folder), alone(folder), Segments(self.folder) as segments:
            _remove_parts(folder)
            paths = self.manifest_paths(stream)
            before = read_manifest(paths[-1]) if paths else None
            sealing = _Sealing(self, stream, before, quarantined)
            if last < sealing.first:
                raise ArchiveError(
                    f"{stream} is archived up to {sealing.first - 1}: nothing to seal up to {last}"
                )
            segments.begin()
            try:
                for rows in sealing.rows(messages, last):
                    segments.add(*rows)
                return sealing.finish(segments, folder)
            finally:
                # On a full disk they would occupy what others need.
                _remove_parts(folder)

    # --- reading ---------------------------------------------------------------------------------

    def records(self, stream: str, *, first: int = 1, last: int | None = None) -> Iterator[Sequence[Read]]:
        """Yield the records in order, in batches for the fold: bare events, no data.

        Raises ArchiveDamaged if a file cannot be read. Hashes are not checked here.
        """
        for manifest in self.manifests(stream):
            end = manifest.last if last is None else min(last, manifest.last)
            if max(first, manifest.first) <= end:
                yield from self._segment_records(manifest, first, end)

    def _segment_records(self, manifest: Manifest, first: int, last: int) -> Iterator[list[Read]]:
        records, events = (self.path(manifest, suffix) for suffix in ("records", "events"))
        batch: list[Read] = []
        buffered = 0
        with Segments(self.folder) as segments:
            try:
                rows = segments.events(records=records, events=events, first=first, last=last)
                for (sequence, at_ns, subject), event_rows in groupby(rows, key=lambda row: row[:3]):
                    decoded = [redaction.decode(text) for *_, text in event_rows if text is not None]
                    batch.append(Read(Stored(subject, sequence, at_ns, b""), decoded))
                    buffered += len(decoded) + 1
                    if buffered >= ROWS:
                        yield batch
                        batch = []
                        buffered = 0
            except (SegmentUnreadable, msgspec.DecodeError) as error:
                raise ArchiveDamaged(f"{events} cannot be read: {error}") from error
        if batch:
            yield batch

    def bare_records(
        self, manifest: Manifest, *, requests: Sequence[str] | None = None, attempts: Sequence[str] = ()
    ) -> Iterator[SealedRecord]:
        """Yield a segment's records in order, their events as bare JSON.

        If `requests` is given, only records with events of these requests are yielded; `attempts` are their
        attempts that started in an earlier segment. Raises ArchiveDamaged.
        """
        records, events = (self.path(manifest, suffix) for suffix in ("records", "events"))
        with Segments(self.folder) as segments:
            try:
                chosen = None
                if requests is not None:
                    chosen = segments.own(events=events, requests=requests, attempts=attempts)
                rows = segments.whole(records=records, events=events, sequences=chosen)
                for head, event_rows in groupby(rows, key=lambda row: row[:5]):
                    sequence, at_ns, subject, writer, content = head
                    texts = [text for *_, text in event_rows if text is not None]
                    yield SealedRecord(sequence, at_ns, subject, writer, content, texts)
            except SegmentUnreadable as error:
                raise ArchiveDamaged(f"{events} cannot be read: {error}") from error

    def hashes(self, manifest: Manifest) -> list[bytes]:
        """Return the hashes of a segment's records in order. Raises ArchiveDamaged."""
        path = self.path(manifest, "records")
        with Segments(self.folder) as segments:
            try:
                return [bytes.fromhex(hashed) for *_, hashed in segments.records(path)]
            except SegmentUnreadable as error:
                raise ArchiveDamaged(f"{path} cannot be read: {error}") from error

    def path(self, manifest: Manifest, suffix: str) -> Path:
        return self.folder / manifest.stream / file_name(manifest.first, suffix)

    # --- verifying -------------------------------------------------------------------------------

    def verify(
        self,
        *,
        anchors: Mapping[str, Sequence[SegmentSealed]] | None = None,
        log_first: Mapping[str, int] | None = None,
        newest: Mapping[str, int] | None = None,
    ) -> Iterator[str]:
        """Yield every problem, a line each.

        `anchors` are the segments that the book names, `log_first` is the first sequence that each stream's
        log still holds. Without anchors, the loss of the last segments cannot be detected. The book must name
        every segment up to `newest`, which was read before the book.
        """
        anchors = anchors or {}
        log_first = log_first or {}
        newest = newest or {}
        for stream in sorted({*self.streams(), *anchors, *log_first}):
            manifests, problems = self._chain(stream)
            yield from problems
            yield from _anchor_problems(stream, manifests, anchors.get(stream, ()))
            yield from _unnamed(manifests, anchors.get(stream, ()), newest.get(stream, 0))
            archived = manifests[-1].last if manifests else 0
            if (log_start := log_first.get(stream, 1)) > archived + 1:
                gap = f"sequences {archived + 1} to {log_start - 1}"
                yield f"{stream}: {gap} are neither in the archive nor in the log"
            with Segments(self.folder) as segments:
                at_ns = 0
                for manifest in manifests:
                    yield from self._segment_problems(segments, manifest, at_ns)
                    at_ns = manifest.at_ns

    def check(self, stream: str, anchors: Sequence[SegmentSealed] = ()) -> list[Manifest]:
        """Return the manifests of a stream after checking chain, anchors and the hash of every file.

        Raises ArchiveDamaged.
        """
        manifests, problems = self._chain(stream)
        damaged = chain.from_iterable(map(self.damaged_files, manifests))
        for problem in chain(problems, _anchor_problems(stream, manifests, anchors), damaged):
            raise ArchiveDamaged(problem)
        return manifests

    def check_head(self, stream: str) -> None:
        """Check the rows of a stream's last segment, whose manifest no other manifest names.

        Raises ArchiveDamaged.
        """
        *earlier, head = self.manifests(stream)
        with Segments(self.folder) as segments:
            for problem in self._segment_problems(segments, head, earlier[-1].at_ns if earlier else 0):
                raise ArchiveDamaged(problem)

    def _chain(self, stream: str) -> tuple[list[Manifest], list[str]]:
        """Return the readable manifests, and the problems in them and between them."""
        manifests: list[Manifest] = []
        problems: list[str] = []
        for path in self.manifest_paths(stream):
            try:
                manifests.append(read_manifest(path))
            except ArchiveDamaged as error:
                problems.append(str(error))
        return manifests, problems + list(_chain_problems(self.folder / stream, stream, manifests))

    def damaged_files(self, manifest: Manifest) -> Iterator[str]:
        """Yield the problems of a segment's files."""
        required = {file_name(manifest.first, suffix) for suffix in SUFFIXES[:2]}
        allowed = required | {file_name(manifest.first, "content")}
        if not required <= manifest.files.keys() <= allowed:
            named = ", ".join(manifest.files) or "no files"
            yield f"{self.path(manifest, 'events')}: its manifest names {named}"
        yield from changed_files(self.folder / manifest.stream, manifest.files, once="sealed")

    def _segment_problems(self, segments: Segments, manifest: Manifest, at_ns: int) -> Iterator[str]:
        damaged = list(self.damaged_files(manifest))
        yield from damaged
        if damaged:
            return
        records, events = (self.path(manifest, suffix) for suffix in ("records", "events"))
        try:
            yield from _row_problems(segments, manifest, records, events, at_ns)
        except SegmentUnreadable as error:
            yield f"{events} cannot be read: {error}"


class _Sealing:
    """One segment while it is being sealed."""

    def __init__(
        self, archive: Archive, stream: str, before: Manifest | None, quarantined: Container[int]
    ) -> None:
        self._archive = archive
        self._stream = stream
        self._before = before
        self._quarantined = quarantined
        self.first = before.last + 1 if before else 1
        self._last = self.first - 1
        self._at_ns = before.at_ns if before else 0
        self._hashes: list[bytes] = []
        self._events = 0

    def rows(
        self, messages: Iterable[Stored], last: int
    ) -> Iterator[tuple[list[Record], list[Event], list[tuple[int, bytes]]]]:
        records: list[Record] = []
        events: list[Event] = []
        content: list[tuple[int, bytes]] = []
        for stored in messages:
            if stored.sequence != self._last + 1 or stored.sequence > last:
                raise ArchiveError(
                    f"{self._stream}: {stored.sequence} came where {self._last + 1} was to be sealed"
                )
            records.append(self._record(stored, events))
            if self._archive._content:
                content.append((stored.sequence, stored.data))
            self._last = stored.sequence
            if len(events) + len(records) >= ROWS:
                yield records, events, content
                records = []
                events = []
                content = []
        if self._last != last:
            raise ArchiveError(
                f"{self._stream}: nothing came after {self._last}, and {last} was to be sealed"
            )
        yield records, events, content

    def _record(self, stored: Stored, rows: list[Event]) -> Record:
        position = f"{self._stream}:{stored.sequence}"
        writer, events, why = decoded(stored)
        if why is not None and stored.sequence not in self._quarantined:
            raise ArchiveError(f"{position} cannot be archived: {why}")
        self._at_ns = max(self._at_ns, stored.stored_at_ns)
        hashes: list[str] = []
        contents: list[Any] = [] if why is None else [stored.data]
        for place, event in enumerate(events):
            text, content = redaction.split(event)
            rows.append((stored.sequence, place, self._at_ns, stored.subject, text.decode()))
            hashes.append(redaction.event_hash(text))
            contents.append(content)
        self._events += len(hashes)
        keyed = redaction.content_hash(self._archive._key, contents)
        hashed = redaction.RecordParts(
            stream=self._stream,
            sequence=stored.sequence,
            at_ns=self._at_ns,
            content=keyed,
            events=hashes,
            subject=stored.subject,
            writer=writer,
        ).record_hash()
        self._hashes.append(hashed)
        return stored.sequence, self._at_ns, stored.subject, writer, keyed, len(hashes), hashed.hex()

    def finish(self, segments: Segments, folder: Path) -> Manifest:
        """Write the files, read them back, and create the manifest."""
        suffixes = SUFFIXES if self._archive._content else SUFFIXES[:2]
        parts = {suffix: folder / f"{file_name(self.first, suffix)}.part" for suffix in suffixes}
        segments.write(records=parts["records"], events=parts["events"], content=parts.get("content"))
        if wrong := segments.wrong(self._stream, records=parts["records"], events=parts["events"]):
            raise ArchiveError(
                f"{self._stream}:{wrong[0]} cannot be archived: its rows do not give its events back"
            )
        for part in parts.values():
            sync(part)
        manifest = Manifest(
            version=VERSION,
            stream=self._stream,
            first=self.first,
            last=self._last,
            at_ns=self._at_ns,
            records=len(self._hashes),
            events=self._events,
            files={part.name.removesuffix(".part"): measure(part) for part in parts.values()},
            root=merkle.root(self._hashes).hex(),
            previous=self._before.sha256 if self._before else "",
        )
        for part in parts.values():
            part.replace(part.with_suffix(""))
        sync(folder)
        create(folder / file_name(self.first), manifest.encoded)
        return manifest


def _remove_parts(folder: Path) -> None:
    """Remove the files of a segment that was not finished."""
    for part in folder.glob("*.part"):
        part.unlink()


def _chain_problems(folder: Path, stream: str, manifests: Sequence[Manifest]) -> Iterator[str]:
    last = 0
    previous = ""
    for manifest in manifests:
        path = folder / file_name(manifest.first)
        if manifest.first > last + 1:
            yield f"{stream}: sequences {last + 1} to {manifest.first - 1} are missing before {path}"
        elif manifest.first <= last or manifest.last < manifest.first:
            yield f"{path} holds sequences {manifest.first} to {manifest.last} behind {last}"
        if manifest.previous != previous:
            yield f"{path} does not follow the manifest before it: the hashes differ"
        last = manifest.last
        previous = manifest.sha256


def _anchor_problems(
    stream: str, manifests: Sequence[Manifest], anchors: Sequence[SegmentSealed]
) -> Iterator[str]:
    by_first = {manifest.first: manifest for manifest in manifests}
    for anchor in anchors:
        manifest = by_first.get(anchor.first)
        if manifest is None:
            yield f"{stream}: the segment of {anchor.first} to {anchor.last} was sealed and is missing"
        elif (manifest.last, manifest.sha256) != (anchor.last, anchor.manifest):
            span = f"{anchor.first} to {anchor.last}"
            yield f"{stream}: the manifest of {span} is not the one that the book names"


def _unnamed(manifests: Sequence[Manifest], anchors: Sequence[SegmentSealed], newest: int) -> Iterator[str]:
    """Yield the segments up to the one that begins at `newest` which the book does not name."""
    named = {anchor.first for anchor in anchors}
    for manifest in manifests:
        if manifest.first <= newest and manifest.first not in named:
            span = f"{manifest.stream}: the segment of {manifest.first} to {manifest.last}"
            yield f"{span} is not named by the book; if it is the last one, verify again in a minute"


def _row_problems(
    segments: Segments, manifest: Manifest, records: Path, events: Path, at_ns: int
) -> Iterator[str]:
    """Yield where the rows of a segment differ from its manifest."""
    hashes = []
    count = 0
    expected = manifest.first
    for sequence, stored_at_ns, number, hashed in segments.records(records):
        if sequence != expected:
            yield f"{records} holds {sequence} where {expected} was expected"
        if stored_at_ns < at_ns:
            yield f"{records}: the time of {sequence} is before that of the record before it"
        expected = sequence + 1
        at_ns = stored_at_ns
        count = count + number
        hashes.append(bytes.fromhex(hashed))
    totals = (expected - 1, at_ns, len(hashes), count)
    if totals != (manifest.last, manifest.at_ns, manifest.records, manifest.events):
        yield f"{records} ends or counts otherwise than its manifest says"
    if merkle.root(hashes).hex() != manifest.root:
        yield f"{records}: the Merkle root of its records is not its manifest's"
    if wrong := segments.wrong(manifest.stream, records=records, events=events):
        yield f"{events}: the hash of {manifest.stream}:{wrong[0]} does not come out ({len(wrong)} in all)"
