"""Records to bytes and back: JSON, one encoder.

JSON, because a person, DuckDB and any tool in ten years can read it. If a record cannot be read as a whole,
it is read event by event, so that an unreadable event fails one request and not its neighbours.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import msgspec

from events import schema, subjects
from events.errors import EventsError
from events.schema import RECORD_VERSION, AnyEvent, Record

# What each kind of subject in the book carries. The broker decides who may write to a subject, so an event
# on another one is not its writer's to make.
OF_BOOK: Mapping[str, set[type]] = {
    "account": {schema.AccountOpened},
    "key": {schema.KeyIssued, schema.KeyRevoked},
    "limits": {schema.LimitsSet},
    "keylimits": {schema.KeyLimitsSet},
    "credit": {schema.CreditGranted, schema.CreditHeld, schema.CreditSettled},
    "correction": {schema.UsageCorrected},
    "price": {schema.PricePublished},
    "period": {schema.PeriodClosed},
    "segment": {schema.SegmentSealed},
    "shard": {schema.ShardOpened},
    "signer": {schema.SigningKeyPublished},
    "quarantine": {schema.RecordQuarantined},
}
EVERY_ENTRY = set[type]().union(*OF_BOOK.values())
OF_FLEET = frozenset(get_args(schema.FleetEvent))

# The types of the broker's own answers.
ANSWER = "io.nats.jetstream.api."

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


class _ShardRecord(Record, frozen=True, kw_only=True, omit_defaults=False):
    """A record of a shard. Its type alone checks the kinds of its events, which costs nothing."""

    events: tuple[schema.RequestEvent | schema.LaneEvent, ...]


class _Answer(msgspec.Struct, frozen=True):
    """An answer of the broker: one of its API, or an acknowledgement."""

    type: str = ""
    stream: str | None = None
    seq: int | None = None


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
_answer = msgspec.json.Decoder(_Answer)
_shard_record = msgspec.json.Decoder(_ShardRecord)


def encode(writer: str, events: Iterable[AnyEvent]) -> bytes:
    return _encoder.encode(Record(writer=writer, events=tuple(events)))


def encode_event(event: AnyEvent) -> bytes:
    return _encoder.encode(event)


def join(writer: str, encoded: Sequence[bytes]) -> bytes:
    """Return the record of events that are encoded already; equal to `encode` of the same events."""
    head = b'{"version":%d,"writer":%s,"events":[' % (RECORD_VERSION, _encoder.encode(writer))
    return head + b",".join(encoded) + b"]}"


def decode(data: bytes, subject: str = "") -> tuple[str, Sequence[AnyEvent | Unreadable]]:
    """Return the writer and its events in order. Raises RecordUnreadable.

    An event that the record's `subject` does not carry is unreadable, and names no request. An answer of the
    broker is a record without events: everyone can have it stored.
    """
    is_of_shard = _is_of_shard(subject)
    try:
        record = _shard_record.decode(data) if is_of_shard else _record.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        if _is_answer(data):
            return "", ()
        writer, events = _decode_each(data)
    else:
        if record.version != RECORD_VERSION:
            raise RecordUnreadable(f"record version {record.version}; this reader knows {RECORD_VERSION}")
        writer, events = record.writer, record.events
        if is_of_shard:
            return writer, events
    if not subject or all(_carries(subject, event) for event in events):
        return writer, events
    return writer, [
        event
        if _carries(subject, event)
        else Unreadable(type(event).__name__, None, None, f"{subject} does not carry it")
        for event in events
    ]


def _carries(subject: str, event: Any) -> bool:
    kind = type(event)
    if kind in EVERY_ENTRY:
        stream, entry = subject.split(".")[1:3]
        return stream == "book" and kind in OF_BOOK.get(entry, EVERY_ENTRY)
    if kind in OF_FLEET:
        # Only control writes to the subject of elections.
        if subject == subjects.LEADER or kind is schema.ControlElected:
            return subject == subjects.LEADER
        return subject == subjects.fleet(subjects.slug(event.model))
    return kind is Unreadable or _is_of_shard(subject)


def _is_of_shard(subject: str) -> bool:
    """Return whether it begins with a shard's number."""
    return subject[5:6].isdigit()


def _is_answer(data: bytes) -> bool:
    """Return whether the broker wrote this: an answer can be sent to any subject, and some are empty."""
    if not data:
        return True
    try:
        answer = _answer.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return answer.type.startswith(ANSWER) or (answer.stream is not None and answer.seq is not None)


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
