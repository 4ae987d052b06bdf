"""Records to bytes and back: JSON, one encoder.

JSON, because a person, DuckDB and any tool in ten years can read it. If a record cannot be read as a whole,
it is read event by event, so that an unreadable event fails one request and not its neighbours.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from events.errors import EventsError
from events.schema import RECORD_VERSION, AnyEvent, Record

_encoder = msgspec.json.Encoder()
_record = msgspec.json.Decoder(Record)
_event = msgspec.json.Decoder(AnyEvent)

# The writer of the records with which a restore continues a log up to its archive's end. They came later than
# those that the archive holds.
RESTORE_WRITER = "restore"


class Unreadable(msgspec.Struct, frozen=True):
    """An event that this reader does not understand, with the request or attempt that it names, if any."""

    type: str
    request: str | None
    attempt: str | None
    problem: str


class RecordUnreadable(EventsError):
    """The data is not a record that this reader knows. The reader must stop, visibly."""


class _Envelope(msgspec.Struct, frozen=True):
    version: int
    writer: str
    events: list[msgspec.Raw]


class _Named(msgspec.Struct, frozen=True):
    type: str
    request: str | None = None
    attempt: str | None = None


_envelope = msgspec.json.Decoder(_Envelope)
_named = msgspec.json.Decoder(_Named)


def encode(writer: str, events: Iterable[AnyEvent]) -> bytes:
    return _encoder.encode(Record(writer=writer, events=tuple(events)))


def encode_event(event: AnyEvent) -> bytes:
    return _encoder.encode(event)


def join(writer: str, encoded: Sequence[bytes]) -> bytes:
    """Return the record of events that are encoded already; equal to `encode` of the same events."""
    head = b'{"version":%d,"writer":%s,"events":[' % (RECORD_VERSION, _encoder.encode(writer))
    return head + b",".join(encoded) + b"]}"


def decode(data: bytes) -> tuple[str, Sequence[AnyEvent | Unreadable]]:
    """Return the writer and its events in order. Raises RecordUnreadable."""
    try:
        record = _record.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _decode_each(data)
    if record.version != RECORD_VERSION:
        raise RecordUnreadable(f"record version {record.version}; this reader knows {RECORD_VERSION}")
    return record.writer, record.events


def is_restored(data: bytes) -> bool:
    """Return whether a restore appended the record. One that cannot be read is reported by others."""
    try:
        return decode(data)[0] == RESTORE_WRITER
    except RecordUnreadable:
        return False


def _decode_each(data: bytes) -> tuple[str, Sequence[AnyEvent | Unreadable]]:
    try:
        envelope = _envelope.decode(data)
        if envelope.version != RECORD_VERSION:
            raise RecordUnreadable(f"record version {envelope.version}; this reader knows {RECORD_VERSION}")
        return envelope.writer, [_decode_one(raw) for raw in envelope.events]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordUnreadable(f"not a record: {error}") from error


def _decode_one(raw: msgspec.Raw) -> Any:
    try:
        return _event.decode(raw)
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        named = _named.decode(raw)
        return Unreadable(named.type, named.request, named.attempt, str(error))
