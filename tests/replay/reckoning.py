"""Invoices computed in the simplest way: one request at a time over the whole log, by the service's rules.

Tests compare the SQL and the auditor with it. The auditor must not import it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from events import codec, schema
from events.ids import parse_request_id
from events.lifecycle import NEW, Life, advance
from events.log import Stored
from events.pricing import billed, cost_nanousd, is_chargeable
from events.schema import Price
from events.subjects import BOOK, Address, parse

Streams = Mapping[str, Sequence[Stored]]
Line = tuple[str, str, str, int]  # period, model, plan, price version
SECOND_NS = 10**9
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
OWN_ENDS = ("draining", "host")


class Place(NamedTuple):
    stream: str
    sequence: int
    index: int

    def __str__(self) -> str:
        return f"{self.stream}:{self.sequence}.{self.index}"


class LoggedEvent(NamedTuple):
    place: Place
    at_ns: int
    at: Address | None
    event: Any


class Ended(NamedTuple):
    """A request that ended: `spans` are its counted attempts, `cached` its prompt's tokens from the cache."""

    acceptance: schema.RequestAccepted
    life: Life
    place: Place
    at_ns: int
    cached: int
    spans: list[tuple[int, int]]


class Charge(NamedTuple):
    """The contribution of one request or correction to a line."""

    place: Place
    tokens: tuple[int, int, int]
    nanousd: int
    spans: list[tuple[int, int]]


def log(stream: str, messages: Iterable[Stored]) -> Iterator[LoggedEvent]:
    at_ns = 0
    for stored in messages:
        at_ns = max(at_ns, stored.stored_at_ns)
        for index, event in enumerate(codec.decode(stored.data)[1]):
            yield LoggedEvent(Place(stream, stored.sequence, index), at_ns, parse(stored.subject), event)


def book(streams: Streams) -> list[LoggedEvent]:
    """Return the entries of the book, each id once."""
    entries: dict[str, LoggedEvent] = {}
    for logged in log(BOOK, streams.get(BOOK, ())):
        entries.setdefault(logged.event.id, logged)
    return list(entries.values())


def prices(streams: Streams) -> dict[tuple[int, str], Price]:
    lists: dict[int, schema.PricePublished] = {}
    for logged in book(streams):
        if isinstance(logged.event, schema.PricePublished):
            lists.setdefault(logged.event.version, logged.event)
    by_model: dict[tuple[int, str], Price] = {}
    for version, published in lists.items():
        for price in published.prices:
            by_model.setdefault((version, price.model), price)
    return by_model


def terms(streams: Streams, account: str, position: int) -> tuple[int, str]:
    """Return the price list and the plan in force at a position of the book."""
    version, plan = 0, "per_token"
    for place, _, _, event in book(streams):
        if place.sequence <= position and isinstance(event, schema.PricePublished):
            version = max(version, event.version)
        elif place.sequence <= position and isinstance(event, schema.LimitsSet) and event.account == account:
            plan = event.plan
    return version, plan


def closes(streams: Streams) -> dict[str, schema.PeriodClosed]:
    by_period: dict[str, schema.PeriodClosed] = {}
    for logged in book(streams):
        if isinstance(logged.event, schema.PeriodClosed):
            by_period.setdefault(logged.event.period, logged.event)
    return by_period


def ends(streams: Streams) -> list[Ended]:
    """Return every request that ended, in order of stream, sequence and index."""
    ended_requests = []
    for stream, messages in streams.items():
        events = list(log(stream, messages))
        ids = {t.event.request for t in events if isinstance(t.event, schema.RequestAccepted)}
        ended_requests += [ended for request in ids if (ended := follow(request, events)) is not None]
    return sorted(ended_requests, key=lambda ended: ended.place)


def follow(request: str, events: Iterable[LoggedEvent]) -> Ended | None:
    life, acceptance, attempts, counted = NEW, None, set(), []
    parsed = parse_request_id(request)
    for place, at_ns, at, event in events:
        if parsed is None or at != parsed.at:
            continue
        if isinstance(event, schema.AttemptStarted) and event.request == request and life.phase == "open":
            attempts.add(event.attempt)
        if getattr(event, "request", request) != request or (
            not hasattr(event, "request") and event.attempt not in attempts
        ):
            continue
        before, life = life, advance(life, event)
        if life.counted != before.counted:
            counted.append((at_ns, event))
        if isinstance(event, schema.RequestAccepted) and life is not before:
            acceptance = event
        if life.phase == "ended":
            assert acceptance is not None
            tokens = [event for _, event in counted if isinstance(event, schema.TokensGenerated)]
            cached = tokens[0].cached_tokens if tokens else 0
            return Ended(acceptance, life, place, at_ns, cached, spans_of(counted))
    return None


def spans_of(counted: Iterable[tuple[int, Any]]) -> list[tuple[int, int]]:
    """Return the span of each counted attempt, from its start to its last own event."""
    spans: dict[str, tuple[int, int]] = {}
    for at_ns, event in counted:
        match event:
            case schema.AttemptStarted():
                spans[event.attempt] = at_ns, at_ns
            case schema.TokensGenerated() | schema.RequestFinished(attempt=str()):
                spans[event.attempt] = spans[event.attempt][0], at_ns
            case schema.AttemptReleased() if event.why in OWN_ENDS:
                spans[event.attempt] = spans[event.attempt][0], at_ns
    return list(spans.values())


def month(place: Place, at_ns: int, closed: Mapping[str, schema.PeriodClosed]) -> str:
    day = EPOCH + timedelta(seconds=at_ns // SECOND_NS)
    while True:
        name = f"{day:%Y-%m}"
        if name not in closed or place.sequence <= closed[name].positions.get(place.stream, 0):
            return name
        day = day.replace(day=1) + timedelta(days=32)


def payers(ended_requests: Iterable[Ended]) -> set[str]:
    """Return the requests that pay for their prompt: in a group, only the first that is charged."""
    first: dict[str, str] = {}
    for ended in ended_requests:
        if is_chargeable(ended.life):
            request = ended.acceptance.request
            first.setdefault(ended.acceptance.group or request, request)
    return set(first.values())


def whole_seconds(spans: Iterable[tuple[int, int]]) -> int:
    """Return the seconds in which anything ran. Each run of overlapping spans is rounded up."""
    running = total = since = 0
    for at_ns, is_end in sorted([(start, False) for start, _ in spans] + [(end, True) for _, end in spans]):
        if not running:
            since = at_ns
        running += -1 if is_end else 1
        if not running:
            total += -(-(at_ns - since) // SECOND_NS)
    return total


def left(spans: Iterable[tuple[int, int]], older: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the parts of the spans that no older span covers."""
    pieces = list(spans)
    for low, high in older:
        cut = (
            [part for start, end in pieces for part in ((start, min(end, low)), (max(start, high), end))]
            if low < high
            else pieces
        )
        pieces = [(start, end) for start, end in cut if start < end]
    return [(start, end) for start, end in pieces if start < end]


def requests(streams: Streams, account: str, period: str) -> dict[str, int]:
    """Return the requests of an audit export, with the sequences of their ends.

    These are the account's requests of the period, earlier ones of their groups, and those of earlier periods
    that ran in the same seconds.
    """
    closed, groups, sequences = closes(streams), set(), {}
    own = [ended for ended in ends(streams) if ended.acceptance.account == account]
    timed = [ended for ended in own if ended.acceptance.plan == "per_second" and is_chargeable(ended.life)]
    spans: list[tuple[str, int, int]] = []
    for acceptance, _, place, at_ns, *_ in reversed(own):
        if month(place, at_ns, closed) == period:
            groups.add(acceptance.group)
        elif acceptance.group is None or acceptance.group not in groups:
            continue
        sequences[acceptance.request] = place.sequence
    for ended in timed:
        if month(ended.place, ended.at_ns, closed) == period:
            spans += [(ended.acceptance.model, *span) for span in ended.spans]
    for ended in timed:
        if month(ended.place, ended.at_ns, closed) < period and any(
            ended.acceptance.model == model and start < last and first < end
            for model, first, last in spans
            for start, end in ended.spans
        ):
            sequences[ended.acceptance.request] = ended.place.sequence
    return sequences


def invoice(
    streams: Streams, account: str, period: str, positions: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Return the invoice, up to `positions` if the month is open. A closed month has its own positions."""
    if positions is None:
        positions = {stream: messages[-1].sequence for stream, messages in streams.items() if messages}
    close = closes(streams).get(period)
    if close is None:
        streams = {
            stream: [stored for stored in messages if stored.sequence <= positions.get(stream, 0)]
            for stream, messages in streams.items()
        }
    lines = list(_lines(streams, account, period))
    return {
        "account": account,
        "period": period,
        "status": "open" if close is None else "closed",
        "lines": lines,
        "total_nanousd": sum(line["nanousd"] for line in lines),
        "positions": dict(positions if close is None else close.positions),
    }


def digest(streams: Streams, period: str) -> str:
    """Return the expected `PeriodClosed.digest` of a month."""
    accounts = [e.acceptance.account for e in ends(streams)] + [
        t.event.account for t in book(streams) if isinstance(t.event, schema.UsageCorrected)
    ]
    text = ""
    for account in sorted(set(accounts)):
        if (bill := invoice(streams, account, period))["lines"]:
            fields = ("model", "plan", "price_version", "prompt_tokens", "cached_tokens", "output_tokens")
            fields += ("seconds", "nanousd", "requests", "digest")
            rows = [" ".join(str(line[field]) for field in fields) + "\n" for line in bill["lines"]]
            text += f"{account} {bill['total_nanousd']} {_sha256(''.join(rows))}\n"
    return _sha256(text)


def _lines(streams: Streams, account: str, period: str) -> Iterator[dict[str, Any]]:
    charges, known, closed = _charges(streams, account), prices(streams), closes(streams)
    for line, line_charges in sorted(charges.items()):
        (billed_in, model, plan, version), seconds = line, 0
        if billed_in != period:
            continue
        nanousd = sum(charge.nanousd for charge in line_charges)
        if plan == "per_second":
            older = [
                span
                for other, others in charges.items()
                if other[1:3] == (model, plan) and (other[0], other[3]) < (period, version)
                for charge in others
                for span in charge.spans
            ]
            spans = [span for charge in line_charges for span in charge.spans]
            seconds = whole_seconds(left(spans, older))
            if period not in closed or closed[period].rules > 1:
                seconds = min(seconds, whole_seconds(left(spans, [])))
            nanousd = seconds * (known[version, model].second_nanousd or 0)
        rows = [f"{c.place} {' '.join(map(str, c.tokens))} {c.nanousd}\n" for c in line_charges]
        yield {
            "model": model,
            "plan": plan,
            "price_version": version,
            "prompt_tokens": sum(charge.tokens[0] for charge in line_charges),
            "cached_tokens": sum(charge.tokens[1] for charge in line_charges),
            "output_tokens": sum(charge.tokens[2] for charge in line_charges),
            "seconds": seconds,
            "nanousd": nanousd,
            "requests": len(line_charges),
            "positions": {"first": str(line_charges[0].place), "last": str(line_charges[-1].place)},
            "digest": _sha256("".join(rows)),
        }


def _charges(streams: Streams, account: str) -> dict[Line, list[Charge]]:
    charges: dict[Line, list[Charge]] = {}
    ended_requests, known, closed = ends(streams), prices(streams), closes(streams)
    paying = payers(ended_requests)
    for acceptance, life, place, at_ns, cached, spans in ended_requests:
        if acceptance.account != account or not is_chargeable(life):
            continue
        price = known[acceptance.price_version, acceptance.model]
        tokens = billed(life, price, cached_tokens=cached, with_prompt=acceptance.request in paying)
        cost = cost_nanousd(tokens, price) if acceptance.plan == "per_token" else 0
        key = month(place, at_ns, closed), acceptance.model, acceptance.plan, acceptance.price_version
        counts = tokens.prompt_tokens, tokens.cached_tokens, tokens.output_tokens
        charges.setdefault(key, []).append(Charge(place, counts, cost, spans))
    corrections = [logged for logged in book(streams) if isinstance(logged.event, schema.UsageCorrected)]
    for place, at_ns, _, event in corrections:
        if event.account == account:
            charge = Charge(place, (0, 0, 0), event.nanousd, [])
            key = month(place, at_ns, closed), event.model or "", "correction", 0
            charges.setdefault(key, []).append(charge)
    return charges


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
