"""Stored messages to rows: the fold behind every bill and every chart.

Each stream is folded in its own order, independent of batch boundaries, so equal logs give equal rows.
`events.request_states` decides which events count and `events.pricing` computes the charge. No clock is
read: time is the stored time, made monotone per stream. No content (prompts, texts) reaches a row.

The fold does not use DuckDB (`warehouse.py` does) and never waits (the control process does).
"""

from collections.abc import Collection, Container, Iterable, Iterator, Sequence, Set
from typing import Any

import msgspec

from events import codec, schema, subjects
from events.codec import RecordUnreadable, Unreadable
from events.fleet import Fleet
from events.ids import parse_request_id
from events.lifecycle import Life
from events.log import Stored
from events.request_states import RequestStates
from events.schema import Price
from replay.errors import ReplayError
from replay.facts.book_rows import entry_rows, price_rows
from replay.facts.request_rows import EventOrigin, Open, accepted_row, note, settle
from replay.facts.rows import (
    REPLICA_EVENTS,
    AttemptRow,
    BookRow,
    DecisionRow,
    ElectionRow,
    PlanRow,
    PriceRow,
    RefusalRow,
    ReplicaRow,
    RequestRow,
    Row,
)

# The reason of the requests for which a report of refusals had no room.
OTHER = "other"
REPLICA_FIELDS = frozenset(ReplicaRow.__struct_fields__)


class BookBehind(ReplayError):
    """A request was admitted at a position of the book that is not folded yet: fold the book first."""

    def __init__(self, stream: str, sequence: int, book: int) -> None:
        super().__init__(f"{stream}:{sequence} was admitted under {subjects.BOOK}:{book}, not folded yet")
        self.stream = stream
        self.sequence = sequence
        self.book = book


class Position(msgspec.Struct, frozen=True):
    """The last folded sequence of a stream, and the largest stored time so far."""

    sequence: int = 0
    stored_at_ns: int = 0


class Stop(msgspec.Struct, frozen=True):
    """The record that could not be folded, and why. No later record is folded."""

    sequence: int
    why: str


class Read(msgspec.Struct, frozen=True):
    """One record, decoded whole."""

    stored: Stored
    events: Sequence[Any]


class Batch(msgspec.Struct, frozen=True):
    """The records of one stream up to the first that cannot be read."""

    stream: str
    records: Sequence[Read]
    stop: Stop | None = None


class Changes(msgspec.Struct):
    """The result of a batch: rows to append, and the open requests whose rows it replaced or ended."""

    position: Position
    rows: list[Row]
    touched: set[str]
    stop: Stop | None = None


def read(
    stream: str, messages: Iterable[Stored], quarantined: Container[int] = (), *, after: int = 0
) -> Batch:
    """Decode records up to the first that is unreadable, or missing: a broker with a damaged file passes over
    what it cannot read. `after` is the sequence before them, 0 if any may be the first.

    A quarantined record has no events.
    """
    records: list[Read] = []
    for stored in messages:
        lost = range(after + 1, stored.sequence if after else 0)
        if (missing := next((one for one in lost if one not in quarantined), None)) is not None:
            return Batch(stream, records, Stop(missing, "the log has lost this record"))
        after = max(after, stored.sequence)
        _, events, why = decoded(stored)
        if why is not None and stored.sequence not in quarantined:
            return Batch(stream, records, Stop(stored.sequence, why))
        records.append(Read(stored, events if why is None else ()))
    return Batch(stream, records)


def decoded(stored: Stored) -> tuple[str, Sequence[Any], str | None]:
    """Return a record's writer, its events and None; if it cannot be read, the last is the reason."""
    try:
        writer, events = codec.decode(stored.data, stored.subject)
    except RecordUnreadable as error:
        return "", (), str(error)
    for index, event in enumerate(events):
        if isinstance(event, Unreadable):
            return "", (), f"event {index} ({event.type}) cannot be read: {event.problem}"
    return writer, events, None


class FactFold:
    """The state between batches. All of it can be restored from the rows."""

    def __init__(self) -> None:
        self.positions: dict[str, Position] = {}
        self.open: dict[str, Open] = {}
        self.lives = RequestStates()
        self.fleet = Fleet()
        self._prices: dict[tuple[int, str], Price] = {}
        self._price_version = 0
        self._book_ids: set[str] = set()
        self._closed: set[str] = set()
        self._quarantined: dict[str, set[int]] = {}
        # By lane: up to which time its reports of refused requests count.
        self._refused_to_ns: dict[str, int] = {}
        # Groups of the current batch whose prompt is charged.
        self._charged: set[str] = set()

    # --- restoring -------------------------------------------------------------------------------

    def restore_book(
        self, ids: Iterable[str], prices: Iterable[PriceRow], periods: Iterable[str] = ()
    ) -> None:
        self._book_ids.update(ids)
        self._closed.update(periods)
        for row in prices:
            self._add_price(row)

    def restore_refusals(self, to_at_ns: Iterable[tuple[str, int]]) -> None:
        self._refused_to_ns.update(to_at_ns)

    def quarantine(self, stream: str, sequence: int) -> None:
        self._quarantined.setdefault(stream, set()).add(sequence)

    def quarantined(self, stream: str) -> Set[int]:
        """Return the records of a stream that are skipped if they cannot be read."""
        return self._quarantined.get(stream, set())

    def restore_request(self, row: RequestRow, life: Life, attempt: AttemptRow | None) -> None:
        """Restore an open request, after the book."""
        self.open[row.request_id] = Open(row, self._prices[row.price_version, row.model], attempt)
        self.lives.follow(row.request_id, life)

    # --- folding ---------------------------------------------------------------------------------

    def position(self, stream: str) -> Position:
        return self.positions.get(stream, Position())

    def new_requests(self, batch: Batch) -> dict[str, int]:
        """Return the accepted requests that are not open, with the position floor of each.

        An acceptance can be stored again at any time, so some may have ended before; only the rows know
        these. Raises BookBehind without any change.
        """
        floors: dict[str, int] = {}
        for record in batch.records:
            for event in record.events:
                if not isinstance(event, schema.RequestAccepted) or event.request in self.open:
                    continue
                parsed = parse_request_id(event.request)
                if parsed is None or parsed.at != subjects.parse(record.stored.subject):
                    continue
                if event.book > self.position(subjects.BOOK).sequence:
                    raise BookBehind(batch.stream, record.stored.sequence, event.book)
                floors[event.request] = parsed.floor
        return floors

    def groups(self, batch: Batch) -> set[str]:
        """Return the groups of all requests that may end in this batch."""
        groups: set[str | None] = set()
        for record in batch.records:
            for event in record.events:
                if isinstance(event, schema.RequestAccepted):
                    groups.add(event.group)
                elif (under_way := self.open.get(self.lives.request_of(event) or "")) is not None:
                    groups.add(under_way.row.group_id)
        return {group for group in groups if group is not None}

    def apply(self, batch: Batch, *, ended: Set[str] = frozenset(), charged: Iterable[str] = ()) -> Changes:
        """Fold a batch. `ended` are those of `new_requests` that ended before it, `charged` those of `groups`
        whose prompt is charged."""
        self._charged = set(charged)
        position = self.position(batch.stream)
        changes = Changes(position, [], set(), batch.stop)
        known = set(ended)
        for record in batch.records:
            stored = record.stored
            if stored.sequence <= position.sequence:
                continue
            if (why := self._unpriced(record, known)) is not None:
                changes.stop = Stop(stored.sequence, why)
                break
            position = Position(stored.sequence, max(position.stored_at_ns, stored.stored_at_ns))
            for index, event in enumerate(record.events):
                origin = EventOrigin(batch.stream, stored.sequence, index, position.stored_at_ns)
                changes.rows.extend(self._event(event, stored.subject, origin, known, changes.touched))
        self.positions[batch.stream] = changes.position = position
        return changes

    def _unpriced(self, record: Read, ended: Collection[str]) -> str | None:
        for event in record.events:
            if not isinstance(event, schema.RequestAccepted):
                continue
            version = event.price_version
            model = event.model
            if (version, model) in self._prices or not self._is_new(event, record.stored.subject, ended):
                continue
            if not 1 <= version <= self._price_version:
                return f"{event.request} has price version {version}, which the book does not hold"
            return f"{event.request}: price version {version} has no price for {model!r}"
        return None

    def _is_new(self, event: schema.RequestAccepted, subject: str, ended: Collection[str]) -> bool:
        parsed = parse_request_id(event.request)
        return (
            parsed is not None
            and parsed.at == subjects.parse(subject)
            and event.request not in self.open
            and event.request not in ended
        )

    def _event(
        self, event: Any, subject: str, origin: EventOrigin, ended: set[str], touched: set[str]
    ) -> Iterable[Row]:
        if origin.stream == subjects.BOOK:
            return self._book_event(event, origin)
        if origin.stream == subjects.FLEET:
            return self._fleet_event(event, origin)
        if isinstance(event, schema.RequestsRefused):
            return self._refusals(event, subject, origin)
        if isinstance(event, schema.RequestAccepted) and self._is_new(event, subject, ended):
            price = self._prices[event.price_version, event.model]
            self.open[event.request] = Open(accepted_row(event, origin), price)
            self.lives.follow(event.request)
        return self._request_event(event, subject, origin, ended, touched)

    def _request_event(
        self, event: Any, subject: str, origin: EventOrigin, ended: set[str], touched: set[str]
    ) -> Iterable[Row]:
        request = self.lives.request_of(event)
        at = subjects.parse(subject)
        if request is None or at is None or request not in self.open:
            return ()
        before = self.lives[request]
        counted = self.lives.fold(event, at)
        life = self.lives[request]
        if life is not before:
            touched.add(request)
        if counted is None:
            return ()
        under_way = self.open[request]
        rows = list(note(under_way, event, origin, life))
        if life.phase == "ended":
            ended.add(request)
            rows += self._settle(under_way, event, origin, life)
            del self.open[request]
            self.lives.forget(request)
        return rows

    def _settle(self, under_way: Open, event: Any, origin: EventOrigin, life: Life) -> Iterator[Row]:
        """Charge the prompt of a group to its first charged request."""
        group = under_way.row.group_id
        for row in settle(under_way, event, origin, life, with_prompt=group not in self._charged):
            if isinstance(row, RequestRow) and row.billed_output_tokens and group is not None:
                self._charged.add(group)
            yield row

    def _refusals(
        self, event: schema.RequestsRefused, subject: str, origin: EventOrigin
    ) -> Iterator[RefusalRow]:
        """Count a report once: it is stored again if its gateway missed the acknowledgement."""
        last_ns = self._refused_to_ns.get(event.lane, 0)
        if subject != subjects.lane(event.shard, event.lane) or event.from_at_ns < last_ns:
            return
        self._refused_to_ns[event.lane] = event.to_at_ns
        others = [schema.RefusalCount(reason=OTHER, count=event.other)] if event.other else []
        for one in (*event.counts, *others):
            yield RefusalRow(
                event.lane,
                event.shard,
                event.from_at_ns,
                event.to_at_ns,
                one.account,
                one.reason,
                one.count,
                origin.position,
                origin.at_ns,
            )

    def _book_event(self, event: Any, origin: EventOrigin) -> Iterator[Row]:
        if not isinstance(event, schema.BookEvent) or event.id in self._book_ids:
            return
        self._book_ids.add(event.id)
        yield BookRow(event.id, type(event).__name__, origin.position, origin.at_ns)
        match event:
            case schema.PricePublished():
                for row in price_rows(event, origin, last_version=self._price_version):
                    self._add_price(row)
                    yield row
            case schema.PeriodClosed():
                # Only the first close of a period counts.
                if event.period not in self._closed:
                    self._closed.add(event.period)
                    yield from entry_rows(event, origin)
            case _:
                if isinstance(event, schema.RecordQuarantined):
                    self.quarantine(event.stream, event.sequence)
                yield from entry_rows(event, origin)

    def _add_price(self, row: PriceRow) -> None:
        self._price_version = max(self._price_version, row.version)
        self._prices[row.version, row.model] = Price(
            model=row.model,
            prompt_nanousd=row.prompt_nanousd,
            output_nanousd=row.output_nanousd,
            cached_prompt_nanousd=row.cached_prompt_nanousd,
            second_nanousd=row.second_nanousd,
        )

    def _fleet_event(self, event: Any, origin: EventOrigin) -> Iterator[Row]:
        counts = self.fleet.apply(event, origin.sequence, origin.at_ns)
        match event:
            case schema.ControlElected():
                yield ElectionRow(event.epoch, event.control, counts, origin.position, origin.at_ns)
            case schema.ScaleDecided():
                before = event.from_replicas
                now = event.to_replicas
                yield DecisionRow(
                    event.model,
                    before,
                    now,
                    event.reason,
                    event.policy,
                    _json(event.positions),
                    _json(event.inputs),
                    event.epoch,
                    counts,
                    event.decided_at_ns,
                    event.plan,
                    origin.position,
                    origin.at_ns,
                )
            case schema.ScalePlanned():
                yield PlanRow(
                    event.model,
                    event.floor,
                    event.restart,
                    event.is_missed,
                    event.policy,
                    _json(subjects.named(event.positions, event.shard_positions)),
                    _json(event.inputs),
                    _json(event.candidates),
                    _json(event.restarts),
                    event.requests,
                    event.sha256,
                    event.from_ns,
                    event.planned_at_ns,
                    event.epoch,
                    counts,
                    origin.position,
                    origin.at_ns,
                )
            case _ if (name := REPLICA_EVENTS.get(type(event))) is not None:
                fields = {field: getattr(event, field) for field in REPLICA_FIELDS if hasattr(event, field)}
                yield ReplicaRow(
                    event=name,
                    ordered_at_ns=self._ordered_at_ns(event) if counts else None,
                    position=origin.position,
                    at_ns=origin.at_ns,
                    **fields,
                )

    def _ordered_at_ns(self, event: Any) -> int | None:
        """Return the time of the decision that a start follows, if it follows one."""
        if not isinstance(event, schema.ReplicaStarting):
            return None
        replica = self.fleet.replicas[event.model][event.replica]
        return replica.began_at_ns if replica.is_ordered else None


def _json(value: object) -> str:
    return msgspec.json.encode(value, order="sorted").decode()
