"""Check an invoice without trusting its issuer: `python auditor.py DIR`, where DIR is an audit export.

This file is for the customer. It needs Python 3.9 or newer and the standard library, and shares no code with
the service behind the invoice. Exit status 0: the invoice is right. 1: it differs; each difference is a line,
but of a log that is wrong itself only the first problem. 2: a file is missing or malformed. DIR holds:

    invoice.json   the invoice that is claimed
    chain.jsonl    the manifest of each segment of the log; each names the SHA-256 of the one before it
    records.jsonl  records of the log: the account's own events as JSON, all other events as hashes
    proofs.jsonl   the nodes that join these records to the Merkle root in their segment's manifest
    signatures.jsonl  the operator's signature of each chain; it may be missing or empty

Three things cannot be checked here: whether the printed heads of the chains and the key of the signatures are
the published ones (compare them), and whether the operator withheld a record. Signatures are checked if the
package `cryptography` is installed; the output says so.
"""

import hashlib
import json
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

# An older Python reads the file up to here, so nothing above or below has syntax that 3.6 does not know.
if sys.version_info < (3, 9):  # noqa: UP036
    sys.exit(print("auditor.py needs Python 3.9 or newer: run it with another one", file=sys.stderr) or 2)

try:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
except ImportError:
    Ed25519PublicKey = None  # type: ignore[assignment,misc]

CHARGEABLE = ("stop", "length", "tool_calls", "cancelled", "revoked", "expired")
SHARED = ("PricePublished", "PeriodClosed", "SigningKeyPublished")
SECOND_NS = 10**9
# The exceptions that a malformed file can cause.
NONSENSE = (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError)
# A number with a fraction stays text, so nothing that is summed up is ever rounded.
parse = json.JSONDecoder(parse_float=str, parse_constant=str).decode

Place = tuple[str, int, int]
"""Stream, sequence of the record, index of the event in the record."""


class Terms(NamedTuple):
    """The terms of an accepted request. `book` is the position up to which its gateway had read the book."""

    model: str
    plan: str
    price_version: int
    group: "str | None"
    book: int


class AuditedRequest:
    """An accepted request. The order of the log decides which events count; none counts after the end."""

    def __init__(self, accepted: Any) -> None:
        self.terms = Terms(
            model=accepted["model"],
            plan=accepted.get("plan", "per_token"),
            price_version=accepted["price_version"],
            group=accepted.get("group"),
            book=accepted.get("book", 0),
        )
        # The attempt that counted last, whether it still runs, and every attempt that was ever seen.
        self.attempt: str | None = None
        self.is_live = False
        self.seen: set[str] = set()
        # For each attempt that counted: its start and its last own event that counted, in nanoseconds.
        self.spans: list[list[int]] = []
        self.cancel_reason: str | None = None
        self.finish_reason = ""
        self.ended_by = ""
        self.end: tuple[Place, int] = (("", 0, 0), 0)  # the last event so far and its time
        self.prompt_tokens = self.cached_tokens = self.output_tokens = 0

    def fold(self, event: Any, place: Place, at_ns: int) -> None:
        if self.finish_reason:
            return
        kind = event["type"]
        attempt = event.get("attempt")
        is_current = self.is_live and attempt == self.attempt
        if kind == "AttemptStarted" and attempt not in self.seen:
            self._start(event, attempt, at_ns)
        elif kind == "TokensGenerated" and is_current and event["index"] == self.output_tokens:
            if self.output_tokens == 0:
                self.cached_tokens = event.get("cached_tokens", 0)
            self.output_tokens = self.output_tokens + event["tokens"]
            self.spans[-1][1] = at_ns
        elif kind == "AttemptReleased" and is_current:
            self.is_live = False
            if event["why"] in ("draining", "host"):
                self.spans[-1][1] = at_ns
        elif kind == "CancelRequested" and attempt is None:
            self.cancel_reason = self.cancel_reason or event["why"]
        elif kind == "RequestFinished" and attempt is None:
            self.finish_reason = event["reason"]
            self.ended_by = "control"
        elif kind == "RequestFinished" and is_current and event["output_tokens"] == self.output_tokens:
            self.finish_reason = event["reason"]
            self.ended_by = "worker"
            self.spans[-1][1] = at_ns
        # A cancellation takes effect as soon as no attempt runs.
        if self.cancel_reason and not self.is_live and not self.finish_reason:
            self.finish_reason = "revoked" if self.cancel_reason == "revoked" else "cancelled"
        self.end = (place, at_ns)

    def _start(self, event: Any, attempt: str, at_ns: int) -> None:
        """Start an attempt, if it follows the last one that counted and resumes at the next token."""
        self.seen.add(attempt)
        if event["after"] != self.attempt or event["resume_index"] != self.output_tokens:
            return
        if not self.spans:
            self.prompt_tokens = event["prompt_tokens"]
        self.attempt = attempt
        self.is_live = True
        self.spans.append([at_ns, at_ns])

    def is_charged(self) -> bool:
        """Return whether the customer pays: not for an empty answer, and not for a failure of the service."""
        is_our_failure = self.ended_by == "control" or self.cancel_reason == "unanswered"
        return self.finish_reason in CHARGEABLE and not is_our_failure and self.output_tokens > 0


class AuditedCharge(NamedTuple):
    """A charged request or a correction. `numbers` are what its line adds up: tokens of the prompt, cached
    tokens, tokens of the output, and nano-USD."""

    place: Place
    at_ns: int
    model: str
    plan: str
    price_version: int
    numbers: tuple[int, int, int, int]
    spans: list[list[int]]


class AuditedBook:
    """The operator's book: prices, the account's plan, closed months and the account's corrections."""

    def __init__(self) -> None:
        self.entries: set[str] = set()
        self.prices: dict[int, dict[str, Any]] = {}
        self.closed: dict[str, Any] = {}
        self.corrections: list[AuditedCharge] = []
        # Each term's values, with the sequence from which each is in force.
        self.terms: dict[str, list[tuple[int, Any]]] = {"price_version": [(0, 0)], "plan": [(0, "per_token")]}

    def add(self, event: Any, place: Place, at_ns: int) -> bool:
        """Add an entry; return False if its id came before.

        A price list counts if it has a price and the next version. The first close of a month counts.
        """
        if event["id"] in self.entries:
            return False
        self.entries.add(event["id"])
        kind = event["type"]
        if kind == "PricePublished":
            # If a list prices a model twice, the first price counts.
            if event["version"] == max(self.prices, default=0) + 1 and event["prices"]:
                self.prices[event["version"]] = {price["model"]: price for price in reversed(event["prices"])}
                self.terms["price_version"].append((place[1], event["version"]))
        elif kind == "LimitsSet":
            self.terms["plan"].append((place[1], event.get("plan", "per_token")))
        elif kind == "PeriodClosed":
            self.closed.setdefault(event["period"], event)
        elif kind == "UsageCorrected":
            model = event.get("model") or ""
            numbers = (0, 0, 0, event["nanousd"])
            self.corrections.append(AuditedCharge(place, at_ns, model, "correction", 0, numbers, []))
        return True

    def in_force(self, term: str, sequence: int) -> Any:
        """Return the value of a term up to a sequence of the book."""
        values = self.terms[term]
        return values[bisect_left(values, (sequence + 1,)) - 1][1]

    def period_of(self, place: Place, at_ns: int) -> str:
        """Return the month of a charge: its own, or the next one that was not closed before it was stored."""
        month = time.strftime("%Y-%m", time.gmtime(at_ns // SECOND_NS))
        while month in self.closed and place[1] > self.closed[month]["positions"].get(place[0], 0):
            month = f"{int(month[:4]) + int(month[5:]) // 12:04}-{int(month[5:]) % 12 + 1:02}"
        return month


class Chain:
    """The chain of manifests of each stream."""

    def __init__(self) -> None:
        self.reached: dict[str, int] = {}  # by stream: the last sequence
        self.hashes: dict[tuple[str, int], str] = {}  # by stream and last sequence: the manifest's SHA-256
        self.segments: dict[tuple[str, int], tuple[int, str]] = {}  # by stream and first: last, Merkle root

    def add(self, stream: str, text: str) -> Iterator[str]:
        """Add the next manifest of a stream; yield what does not follow from the manifest before it."""
        manifest = parse(text)
        first = self.reached.get(stream, manifest["first"] - 1) + 1
        expected = {
            "stream": stream,
            "first": first,
            "records": manifest["last"] - first + 1,
            "previous": self.hashes.get((stream, first - 1), ""),
        }
        for name, value in expected.items():
            if manifest[name] != value:
                yield f"{name} is not {value!r}"
        self.segments[stream, first] = (manifest["last"], manifest["root"])
        self.hashes[stream, manifest["last"]] = sha256(text)
        self.reached[stream] = manifest["last"]

    def heads(self) -> dict[str, str]:
        return {stream: self.hashes[stream, last] for stream, last in self.reached.items()}


class Signatures:
    """The signatures of an export. `published` are the keys in the book, `used` those of valid signatures."""

    def __init__(self) -> None:
        self.published: set[str] = set()
        self.used: set[str] = set()
        self.wrong: list[str] = []
        self.missing: list[str] = []  # what is not signed although a key is published
        self.count = 0

    def add(self, at: str, signed: Any, lines: list[str]) -> None:
        """Check that the lines are signed by the key that is named."""
        self.count = self.count + 1
        if Ed25519PublicKey is None:
            return
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signed["signer"]))
            key.verify(bytes.fromhex(signed["signature"]), "".join(f"{line}\n" for line in lines).encode())
        except (InvalidSignature, *NONSENSE):
            self.wrong.append(f"{at}: the signature is not valid")
        else:
            self.used.add(signed["signer"])

    def sentences(self) -> Iterator[str]:
        """Yield what is known about signatures, for the end of the output."""
        if not self.count:
            yield "signatures: none in this export"
        elif Ed25519PublicKey is None:
            yield f"signatures: {self.count}, not checked: install the package cryptography"
        yield from (f"signatures: a key is in the book, but not signed: {what}" for what in self.missing)
        for key in sorted(self.used):
            book = "" if key in self.published else ", which is not in the book up to here"
            yield f"signatures: valid, by key {key}{book}"


class Audit:
    """The audit of one folder. After `check`, `wrong` holds the differences; `at` is the place being read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.at = ""
        self.wrong: list[str] = []
        self.is_log_wrong = True  # until it is read
        self.account = self.period = ""
        self.records = 0
        self.chain = Chain()
        self.book = AuditedBook()
        self.signatures = Signatures()
        self.requests: dict[str, AuditedRequest] = {}
        self.request_of: dict[str, str] = {}  # by attempt

    def check(self) -> Any:
        """Return the invoice as the log gives it."""
        (claimed,) = self.read("invoice.json")
        self.account = claimed["account"]
        self.period = claimed["period"]
        self.read_chain()
        self.read_records({(row["stream"], row["first"]): row["nodes"] for row in self.read("proofs.jsonl")})
        self.check_terms()
        self.check_signatures()
        self.is_log_wrong = bool(self.wrong)
        computed = self.invoice()
        claimed_values = dict(leaves(claimed))
        computed_values = dict(leaves(computed))
        for name in sorted({*claimed_values, *computed_values}):
            claim, value = claimed_values.get(name), computed_values.get(name)
            if claim != value:
                self.wrong.append(f"invoice{name} is {claim}, by the log it is {value}")
        return computed

    def read(self, name: str) -> Iterator[Any]:
        """Yield the values of a file, one a line."""
        self.at = name
        with Path(self.folder, name).open("rb") as file:
            for number, line in enumerate(file, 1):
                self.at = f"{name} line {number}"
                yield parse(line.decode())

    def read_chain(self) -> None:
        for row in self.read("chain.jsonl"):
            for problem in self.chain.add(row["stream"], row["manifest"]):
                self.wrong.append(f"{self.at}: {problem}")

    def read_records(self, proofs: dict[tuple[str, int], list[str]]) -> None:
        """Fold the records that are shown, and prove each with the proof of its segment."""
        before = ("", 0)
        for segment, rows in groupby(self.read("records.jsonl"), lambda row: (row["stream"], row["first"])):
            stream, first = segment
            last, root = self.chain.segments.get(segment, (0, ""))
            hashes: dict[int, bytes] = {}  # by the record's index in the segment
            # Problems of rows and proof come before those of the events, which may follow from them.
            place = len(self.wrong)
            for row in rows:
                position = (row["stream"], row["sequence"])
                if position <= before or not first <= row["sequence"] <= last:
                    self.wrong.insert(place, f"{self.at}: out of order, twice, or in no segment of the chain")
                    place += 1
                    continue
                before = position
                hashes[row["sequence"] - first] = record_hash(row)
                self.fold_record(row)
            self.records += len(hashes)
            if root != merkle_root(last - first + 1, hashes, proofs.pop(segment, ["00"])):
                self.wrong.insert(
                    place, f"records.jsonl: no proof of {stream}:{first} to {last}: one is missing or changed"
                )
        self.wrong += [f"proofs.jsonl: {stream}:{first} belongs to no record" for stream, first in proofs]

    def fold_record(self, row: Any) -> None:
        """Fold the events of a record that are shown as JSON; all others are hashes."""
        fold = self.fold_entry if row["stream"] == "RIFT_BOOK" else self.fold_event
        for index, event in enumerate(row["events"]):
            if isinstance(event, dict):
                place = (row["stream"], row["sequence"], index)
                if not fold(parse(event["json"]), place, row):
                    self.wrong.append(f"{self.at}: event {index} is not the account's, or of no request here")

    def fold_entry(self, event: Any, place: Place, row: Any) -> bool:
        """Add an entry of the book; return whether the account may see it."""
        if self.book.add(event, place, row["at_ns"]) and event["type"] == "PeriodClosed":
            for stream, root in event["roots"].items():
                if stream not in self.chain.reached:
                    continue
                if root != self.chain.hashes.get((stream, event["positions"][stream])):
                    self.wrong.append(f"{self.at}: {event['period']} was closed with another log of {stream}")
            if self.book.closed[event["period"]] is event:
                if event.get("signature"):
                    self.signatures.add(self.at, event, closed_lines(event))
                elif self.signatures.published:
                    self.signatures.missing.append(f"the close of {event['period']}")
        if event["type"] == "SigningKeyPublished":
            self.signatures.published.add(event["key"])
        return event["type"] in SHARED or bool(event["account"] == self.account)

    def fold_event(self, event: Any, place: Place, row: Any) -> bool:
        """Fold an event of a request; return whether the request is the account's.

        A request's id names the subject of its events. An event on another subject belongs to no request.
        """
        request_id = event.get("request") or self.request_of.get(event.get("attempt"), "")
        subject = row["subject"].split(".")
        if subject[1:2] + subject[3:] != request_id.split("_")[1:4]:
            return False
        if event["type"] == "RequestAccepted" and event["account"] == self.account:
            self.requests.setdefault(request_id, AuditedRequest(event))
        elif event["type"] == "AttemptStarted":
            self.request_of.setdefault(event["attempt"], request_id)
        if request_id in self.requests:
            self.requests[request_id].fold(event, place, row["at_ns"])
        return request_id in self.requests

    def check_terms(self) -> None:
        """Check that each request has the prices and plan in force where its gateway had read the book."""
        for request_id, request in self.requests.items():
            book = request.terms.book
            for term in self.book.terms:
                claim = getattr(request.terms, term)
                value = self.book.in_force(term, book)
                if claim != value:
                    self.wrong.append(f"{request_id}: {term} is {claim}, at RIFT_BOOK:{book} it is {value}")

    def check_signatures(self) -> None:
        """Check the last signed manifest of each chain, and the signed closes of months in the book."""
        reached: dict[str, int] = {}
        if Path(self.folder, "signatures.jsonl").exists():
            for row in self.read("signatures.jsonl"):
                if row["manifest"] != self.chain.hashes.get((row["stream"], row["last"])):
                    self.wrong.append(f"{self.at}: it signs a manifest that is not in the chain")
                self.signatures.add(self.at, row, ["rift segment", row["manifest"]])
                reached[row["stream"]] = row["last"]
        if self.signatures.published:
            for stream, last in self.chain.reached.items():
                if reached.get(stream, 0) < last:
                    self.signatures.missing.append(f"{stream} from {reached.get(stream, 0) + 1} to {last}")
        self.wrong += self.signatures.wrong

    def charges(self) -> Iterator[AuditedCharge]:
        """Yield the charges of all requests, in the order of their ends."""
        prompted = set()  # groups whose prompt is paid
        for request in sorted(self.requests.values(), key=lambda request: request.end[0]):
            if not request.is_charged():
                continue
            terms = request.terms
            price = self.book.prices[terms.price_version][terms.model]
            place, at_ns = request.end
            # In a group (n > 1), only the first request that is charged pays for the prompt.
            group = terms.group or place
            prompt = 0 if group in prompted else request.prompt_tokens
            prompted.add(group)
            cached = min(request.cached_tokens, prompt) if "cached_prompt_nanousd" in price else 0
            cost = (prompt - cached) * price["prompt_nanousd"]
            cost += cached * price.get("cached_prompt_nanousd", 0)
            cost += request.output_tokens * price["output_nanousd"]
            if terms.plan != "per_token":
                cost = 0  # the line pays for seconds
            numbers = (prompt - cached, cached, request.output_tokens, cost)
            yield AuditedCharge(
                place, at_ns, terms.model, terms.plan, terms.price_version, numbers, request.spans
            )

    def invoice(self) -> dict[str, Any]:
        self.at = "prices of the book, by version and model"
        by_line: dict[tuple[str, str, str, int], list[AuditedCharge]] = {}
        for charge in [*self.book.corrections, *self.charges()]:
            period = self.book.period_of(charge.place, charge.at_ns)
            key = (period, charge.model, charge.plan, charge.price_version)
            by_line.setdefault(key, []).append(charge)
        # Lines of other months are computed too: a second that an earlier line pays is not paid again.
        paid: dict[str, list[list[int]]] = {}  # by model
        lines = []
        for key in sorted(by_line):
            rules = self.book.closed.get(key[0], {"rules": 2}).get("rules", 1)
            line = self.line(by_line[key], paid, rules)
            if key[0] == self.period:
                lines.append(line)
        return {
            "account": self.account,
            "period": self.period,
            "status": "closed" if self.period in self.book.closed else "open",
            "lines": lines,
            "total_nanousd": sum(line["nanousd"] for line in lines),
            "positions": self.book.closed.get(self.period, {"positions": self.chain.reached})["positions"],
            "heads": self.chain.heads(),
        }

    def line(self, charges: list[AuditedCharge], paid: dict[str, Any], rules: int) -> dict[str, Any]:
        """Return one line by a version of the rules; add the time it pays for to `paid`."""
        first = charges[0]
        rows = [" ".join(map(str, (position(charge.place), *charge.numbers))) + "\n" for charge in charges]
        prompt, cached, output, nanousd = (sum(charge.numbers[at] for charge in charges) for at in range(4))
        seconds = 0
        if first.plan == "per_second":
            spans = [span for charge in charges for span in charge.spans]
            older = paid.get(first.model, [])
            seconds = whole_seconds(spans, older)
            if rules > 1:
                seconds = min(seconds, whole_seconds(spans, []))
            paid[first.model] = older + spans
            price = self.book.prices[first.price_version][first.model]
            nanousd = seconds * price.get("second_nanousd", 0)
        return {
            "model": first.model,
            "plan": first.plan,
            "price_version": first.price_version,
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "output_tokens": output,
            "seconds": seconds,
            "nanousd": nanousd,
            "requests": len(charges),
            "positions": {"first": position(first.place), "last": position(charges[-1].place)},
            "digest": sha256("".join(rows)),
        }


def closed_lines(event: Any) -> list[str]:
    """Return the lines that are signed of a closed month."""
    lines = ["rift period", event["period"], event["digest"], str(event.get("rules", 1))]
    lines += [f"{stream} {event['positions'][stream]}" for stream in sorted(event["positions"])]
    return lines + [f"{stream} {event['roots'][stream]}" for stream in sorted(event["roots"])]


def position(place: Place) -> str:
    stream, sequence, index = place
    return f"{stream}:{sequence}.{index}"


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the JSON of every value. As JSON, 1 and true are different."""
    if value and isinstance(value, (dict, list)):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{path}.{name}")
    else:
        yield path, json.dumps(value)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def record_hash(row: Any) -> bytes:
    events = [sha256(event["json"]) if isinstance(event, dict) else event for event in row["events"]]
    if any(len(event) != 64 for event in events):
        raise ValueError("an event is neither JSON nor a SHA-256")
    fields = [row["stream"], row["sequence"], row["at_ns"], row["content"], "".join(events) or "-"]
    fields += [row["subject"], row["writer"]]
    return bytes.fromhex(sha256(" ".join(map(str, fields))))


def merkle_root(size: int, hashes: dict[int, bytes], nodes: list[str]) -> str:
    """Return the root (RFC 6962) over `size` records from the hashes of some and the nodes above the rest."""
    indexes = sorted(hashes)
    remaining = iter(nodes)

    def root(low: int, high: int) -> bytes:
        at = bisect_left(indexes, low)
        if at == len(indexes) or indexes[at] >= high:
            return bytes.fromhex(next(remaining, ""))
        if high - low == 1:
            return hashlib.sha256(b"\0" + hashes[low]).digest()
        middle = low + (1 << ((high - low - 1).bit_length() - 1))
        return hashlib.sha256(b"\1" + root(low, middle) + root(middle, high)).digest()

    # Append unused nodes, so that the result cannot equal the root.
    return root(0, size).hex() + "".join(remaining)


def whole_seconds(spans: list[list[int]], older: list[list[int]]) -> int:
    """Return the time in which one of `spans` runs and none of `older`; round up each piece of that time."""
    # While an older span runs, its weight keeps the sum of all weights below 0.
    weighted = [(span, 1) for span in spans] + [(span, -1 - len(spans)) for span in older]
    changes = []
    for (start, end), weight in weighted:
        changes.append((start, weight))
        changes.append((end, -weight))
    running = since = seconds = 0
    for at_ns, group in groupby(sorted(changes), lambda change: change[0]):
        before = running
        running = running + sum(weight for _, weight in group)
        if before <= 0:
            since = at_ns
        elif running <= 0:
            seconds -= (since - at_ns) // SECOND_NS
    return seconds


def main(folder: str = ".") -> int:
    audit = Audit(Path(folder))
    try:
        bill = audit.check()
    except NONSENSE as error:
        why: Any = f"{error} is missing" if type(error) is KeyError else error
        if isinstance(error, OSError):
            why = f"{error.strerror}; '{folder}' must be a folder that `rift audit export` wrote"
        if not audit.wrong:
            print(f"unreadable: {audit.at}: {why}", file=sys.stderr)
            return 2
    if audit.is_log_wrong:
        del audit.wrong[1:]  # the others may only follow from the first
    if audit.wrong:
        print("different:", *audit.wrong, sep="\n" if audit.wrong[1:] else " ")
        return 1
    total = bill["total_nanousd"]
    usd = f"{'-' if total < 0 else ''}{abs(total) // 10**9}.{abs(total) % 10**9:09}"
    requests = sum(line["requests"] for line in bill["lines"] if line["plan"] != "correction")
    print(f"equal: account {audit.account}, period {audit.period} ({bill['status']}):", end=" ")
    print(f"{total} nano-USD ({usd} USD), {requests} requests, {audit.records} records")
    for stream, head in bill["heads"].items():
        print(f"head: {stream}:{audit.chain.reached[stream]} {head}")
    print(*audit.signatures.sentences(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
