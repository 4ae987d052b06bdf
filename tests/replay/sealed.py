"""An in-memory archive: the part of `replay.archive.Archive` that an export reads."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from events import codec, merkle, redaction
from events.log import Stored
from replay.archive.archive import SealedRecord

KEY = b"the installation's"


class Segment(NamedTuple):
    first: int
    last: int
    sha256: str
    text: str
    records: list[SealedRecord]
    hashes: list[bytes]


class SealedLists:
    def __init__(self) -> None:
        self.chains: dict[str, list[Segment]] = {}
        self.asked: list[
            tuple[Segment, Mapping[str, Sequence[str]]]
        ] = []  # each segment that was read, and its filter

    def seal(self, streams: Mapping[str, Sequence[Stored]]) -> None:
        """Seal the records since the previous call, as one segment per stream."""
        for stream, messages in streams.items():
            chain = self.chains.setdefault(stream, [])
            sealed = chain[-1].last if chain else 0
            at_ns = chain[-1].records[-1].at_ns if chain else 0
            records = []
            for stored in messages[sealed:]:
                at_ns = max(at_ns, stored.stored_at_ns)
                writer, events = codec.decode(stored.data)
                parts = [redaction.split(event) for event in events]
                content = redaction.content_hash(KEY, [content for _, content in parts])
                texts = [text.decode() for text, _ in parts]
                records.append(SealedRecord(stored.sequence, at_ns, stored.subject, writer, content, texts))
            if records:
                chain.append(_segment(stream, records, chain[-1].sha256 if chain else ""))

    def positions(self) -> dict[str, int]:
        return {stream: chain[-1].last for stream, chain in self.chains.items() if chain}

    def heads(self) -> dict[str, str]:
        return {stream: chain[-1].sha256 for stream, chain in self.chains.items() if chain}

    def streams(self) -> list[str]:
        return list(self.chains)

    def manifests(self, stream: str) -> list[Segment]:
        return self.chains.get(stream, [])

    def bare_records(self, segment: Segment, **own: Sequence[str]) -> Iterator[SealedRecord]:
        self.asked.append((segment, own))
        return iter(segment.records)

    def hashes(self, segment: Segment) -> list[bytes]:
        return segment.hashes


def _segment(stream: str, records: list[SealedRecord], previous: str) -> Segment:
    hashes = [
        redaction.RecordParts(
            stream=stream,
            sequence=record.sequence,
            at_ns=record.at_ns,
            content=record.content,
            events=[redaction.event_hash(event.encode()) for event in record.events],
            subject=record.subject,
            writer=record.writer,
        ).record_hash()
        for record in records
    ]
    manifest = {
        "version": 1,
        "stream": stream,
        "first": records[0].sequence,
        "last": records[-1].sequence,
        "at_ns": records[-1].at_ns,
        "records": len(records),
        "events": sum(len(record.events) for record in records),
        "files": {},
        "root": merkle.root(hashes).hex(),
        "previous": previous,
    }
    text = json.dumps(manifest, separators=(",", ":"))
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Segment(records[0].sequence, records[-1].sequence, sha256, text, records, hashes)
