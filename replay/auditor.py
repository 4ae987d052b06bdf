"""Check an invoice without trusting who wrote it: `python auditor.py DIR`, where DIR is an audit export.

One file for who pays: Python 3.9 or newer, its standard library, no code of the service behind the invoice.
Exit status 0: equal; 1: different, each difference is a line; 2: a file is missing or makes no sense. In DIR:
`invoice.json`, what is claimed; `chain.jsonl`, the manifest of each segment of the log, with the SHA-256 of
the one before; `records.jsonl`, records of the log, the account's own events as JSON, of others the hashes;
`proofs.jsonl`, what joins those records to the Merkle root in their manifest. Two things cannot be seen here:
whether the heads of the chains are those that were published (compare them), and what was held back.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

CHARGEABLE = ("stop", "length", "tool_calls", "cancelled", "revoked", "expired")
NUMBERS = ("prompt_tokens", "cached_tokens", "output_tokens", "seconds", "nanousd", "requests")
SECOND_NS = 10**9
NONSENSE = (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError)
Place = tuple[str, int, int]  # stream, sequence, index of the event in its record
parse = json.JSONDecoder(parse_float=str, parse_constant=str).decode  # what is added up has no fraction


class Request:
    """An accepted request. The log's order alone says which events count; after the end none does.
    `spans` are the attempts that counted, each from its start to its last own event that counted."""

    def __init__(self, accepted: Any) -> None:
        self.model = accepted["model"]
        self.plan = accepted.get("plan", "per_token")
        self.price_version = accepted["price_version"]
        self.group = accepted.get("group")
        self.attempt = None
        self.wanted = None
        self.reason = ""
        self.ender = ""
        self.book = accepted.get("book", 0)
        self.is_live = False
        self.seen = set[str]()
        self.spans = list[list[int]]()
        self.end = ("", 0, 0)
        self.end_ns = 0
        self.prompt = self.cached = self.output = 0

    def fold(self, event: Any, place: Place, at_ns: int) -> None:
        if self.reason:
            return
        kind = event["type"]
        attempt = event.get("attempt")
        is_own = False
        is_current = self.is_live and attempt == self.attempt
        if kind == "AttemptStarted" and attempt not in self.seen:
            self.seen.add(attempt)
            # It must know the attempt that counted last and how many tokens count; then all older are out.
            if (event["after"], event["resume_index"]) == (self.attempt, self.output):
                self.prompt = self.prompt if self.spans else event["prompt_tokens"]
                self.attempt = attempt
                self.is_live = True
                self.spans.append([at_ns, at_ns])
        elif kind == "TokensGenerated" and is_current and event["index"] == self.output:
            self.cached = self.cached if self.output else event.get("cached_tokens", 0)
            self.output = self.output + event["tokens"]
            is_own = True
        elif kind == "AttemptReleased" and is_current:
            self.is_live = False
            is_own = event["why"] in ("draining", "host")
        elif kind == "CancelRequested" and attempt is None:
            self.wanted = self.wanted or event["why"]
        elif kind == "RequestFinished" and attempt is None:
            self.reason = event["reason"]
            self.ender = "control"
        elif kind == "RequestFinished" and is_current and event["output_tokens"] == self.output:
            self.reason = event["reason"]
            self.ender = "worker"
            is_own = True
        if self.wanted and not self.is_live and not self.reason:
            self.reason = "revoked" if self.wanted == "revoked" else "cancelled"
        if is_own:
            self.spans[-1][1] = at_ns
        self.end = place
        self.end_ns = at_ns


class Audit:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.at = ""  # what is being read
        self.records = 0
        self.wrong: list[str] = []
        self.reached: dict[str, int] = {}  # by stream: the last sequence
        self.ends: dict[tuple[str, int], str] = {}  # stream, last of a segment: its manifest's SHA-256
        self.segments: dict[tuple[str, int], tuple[int, str]] = {}  # stream, first: last, Merkle root
        self.requests, self.owners = dict[str, Request](), dict[str, str]()  # owners: by attempt
        self.entries = set[str]()
        self.closed = dict[str, Any]()
        self.corrections = list[Any]()
        self.prices, self.paid = dict[int, dict[str, Any]](), dict[str, list[list[int]]]()  # paid: by model
        self.terms: dict[str, list[tuple[int, Any]]] = {"price_version": [(0, 0)], "plan": [(0, "per_token")]}

    def check(self) -> Any:
        """Return the invoice as it should be; `wrong` then holds the differences."""
        (claimed,) = self.read("invoice.json")
        self.account = claimed["account"]
        self.period = claimed["period"]
        self.read_chains()
        self.read_records({(row["stream"], row["first"]): row["nodes"] for row in self.read("proofs.jsonl")})
        self.check_terms()
        found = self.invoice()
        says = dict(leaves(claimed))
        is_so = dict(leaves(found))
        for name in sorted({*says, *is_so}):
            if says.get(name) != is_so.get(name):
                self.wrong.append(f"invoice{name} is {says.get(name)}, by the log it is {is_so.get(name)}")
        return found

    def read(self, name: str) -> Iterator[Any]:
        self.at = name
        with Path(self.folder, name).open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                self.at = f"{name} line {number}"
                yield parse(line)

    def read_chains(self) -> None:
        for row in self.read("chain.jsonl"):
            stream = row["stream"]
            told = parse(row["manifest"])
            first = self.reached.get(stream, told["first"] - 1) + 1
            size = told["last"] - first + 1
            previous = self.ends.get((stream, first - 1), "")
            should = {"stream": stream, "first": first, "records": size, "previous": previous}
            self.wrong += [f"{self.at}: {n} is not {should[n]!r}" for n in should if told[n] != should[n]]
            self.segments[stream, first] = told["last"], told["root"]
            self.ends[stream, told["last"]] = sha256(row["manifest"])
            self.reached[stream] = told["last"]

    def read_records(self, proofs: dict[tuple[str, int], list[str]]) -> None:
        before = "", 0
        for segment, rows in groupby(self.read("records.jsonl"), lambda row: (row["stream"], row["first"])):
            last, root = self.segments.get(segment, (0, ""))
            chosen: dict[int, bytes] = {}
            for row in rows:
                if (row["stream"], row["sequence"]) <= before or not segment[1] <= row["sequence"] <= last:
                    self.wrong.append(f"{self.at}: out of order, here twice, or in no segment of the chain")
                    continue
                before = row["stream"], row["sequence"]
                chosen[row["sequence"] - segment[1]] = record_hash(row)
                take = self.entry if row["stream"] == "RIFT_BOOK" else self.work
                for at, shown in enumerate(row["events"]):
                    if isinstance(shown, dict) and not take(parse(shown["json"]), (*before, at), row):
                        self.wrong += [f"{self.at}: event {at} is not the account's, or of no request here"]
            self.records += len(chosen)
            if root != merkle_root(last - segment[1] + 1, chosen, proofs.pop(segment, ["00"])):
                self.wrong.append(f"records.jsonl: no proof of {segment[0]}:{segment[1]} to {last}")
        self.wrong += [f"proofs.jsonl: {stream}:{first} belongs to no record" for stream, first in proofs]

    def entry(self, event: Any, place: Place, row: Any) -> bool:
        """An entry of the book counts once, and the first list of a version, the first close of a month."""
        kind = event["type"] if event["id"] not in self.entries else "repeated"
        self.entries.add(event["id"])
        if kind == "PricePublished":
            if event["version"] == max(self.prices, default=0) + 1 and event["prices"]:
                self.prices[event["version"]] = {p["model"]: p for p in reversed(event["prices"])}
                self.terms["price_version"].append((place[1], event["version"]))
        elif kind == "LimitsSet":
            self.terms["plan"].append((place[1], event.get("plan", "per_token")))
        elif kind == "PeriodClosed":
            self.closed.setdefault(event["period"], event)
            for stream, root in event["roots"].items():
                if stream in self.reached and root != self.ends.get((stream, event["positions"][stream])):
                    self.wrong.append(f"{self.at}: {event['period']} was closed with another log of {stream}")
        elif kind == "UsageCorrected":
            key = event.get("model") or "", "correction", 0
            self.corrections.append((place, row["at_ns"], key, (0, 0, 0, event["nanousd"]), []))
        return event["type"] in ("PricePublished", "PeriodClosed") or bool(event["account"] == self.account)

    def work(self, event: Any, place: Place, row: Any) -> bool:
        """The id of a request says where its events stand; those that stand elsewhere are nobody's."""
        name = event.get("request") or self.owners.get(event.get("attempt"), "")
        subject = row["subject"].split(".")
        if subject[1:2] + subject[3:] != name.split("_")[1:4]:
            return False
        if event["type"] == "RequestAccepted" and event["account"] == self.account:
            self.requests.setdefault(name, Request(event))
        elif event["type"] == "AttemptStarted":
            self.owners.setdefault(event["attempt"], name)
        if name in self.requests:
            self.requests[name].fold(event, place, row["at_ns"])
        return name in self.requests

    def check_terms(self) -> None:
        """Each request has the prices and the plan in force up to where its gateway had read the book."""
        for name, request in self.requests.items():
            for term, found in self.terms.items():
                says = getattr(request, term)
                (_, is_so) = found[bisect_left(found, (request.book + 1,)) - 1]
                if says != is_so:
                    self.wrong.append(f"{name}: {term} is {says}, at RIFT_BOOK:{request.book} it is {is_so}")

    def period_of(self, place: Place, at_ns: int) -> str:
        """Return its own month, or the next that was not closed before it came."""
        month = time.strftime("%Y-%m", time.gmtime(at_ns // SECOND_NS))
        while month in self.closed and place[1] > self.closed[month]["positions"].get(place[0], 0):
            month = f"{int(month[:4]) + int(month[5:]) // 12:04}-{int(month[5:]) % 12 + 1:02}"
        return month

    def invoice(self) -> dict[str, Any]:
        facts = self.corrections
        prompted = set()
        self.at = "prices of the book, by version and model"
        for request in sorted(self.requests.values(), key=lambda request: request.end):
            # Nobody pays for nothing, for our failures, or for what could not reach him because of us.
            is_ours = request.ender == "control" or request.wanted == "unanswered"
            if request.reason in CHARGEABLE and not is_ours and request.output > 0:
                price = self.prices[request.price_version][request.model]
                # Of a group (n > 1), only the first that is charged pays for the prompt.
                group = request.group or request.end
                prompt = 0 if group in prompted else request.prompt
                prompted.add(group)
                cached = min(request.cached, prompt) if "cached_prompt_nanousd" in price else 0
                cost = (prompt - cached) * price["prompt_nanousd"] + request.output * price["output_nanousd"]
                cost += cached * price.get("cached_prompt_nanousd", 0)
                tokens = prompt - cached, cached, request.output, cost if request.plan == "per_token" else 0
                key = request.model, request.plan, request.price_version
                facts.append((request.end, request.end_ns, key, tokens, request.spans))
        lines: dict[tuple[str, str, str, int], list[Any]] = {}
        for place, at_ns, key, tokens, spans in facts:
            entry = "{}:{}.{}".format(*place), tokens, spans
            lines.setdefault((self.period_of(place, at_ns), *key), []).append(entry)
        told = [it for key in sorted(lines) if (it := self.line(key, lines[key])) and key[0] == self.period]
        return {
            "account": self.account,
            "period": self.period,
            "status": "closed" if self.period in self.closed else "open",
            "lines": told,
            "total_nanousd": sum(line["nanousd"] for line in told),
            "positions": self.closed.get(self.period, {"positions": self.reached})["positions"],
            "heads": {stream: self.ends[stream, last] for stream, last in self.reached.items()},
        }

    def line(self, key: Any, entries: list[Any]) -> dict[str, Any]:
        (_, model, plan, version) = key
        seconds = 0
        digest = sha256("".join(" ".join(map(str, (at, *tokens))) + "\n" for at, tokens, _ in entries))
        prompt, cached, output, nanousd = (sum(tokens[at] for _, tokens, _ in entries) for at in range(4))
        if plan == "per_second":
            spans = [span for _, _, spans in entries for span in spans]
            older = self.paid.get(model, [])
            seconds = whole_seconds(spans, older)
            self.paid[model] = older + spans
            nanousd = seconds * self.prices[version][model].get("second_nanousd", 0)
        numbers = prompt, cached, output, seconds, nanousd, len(entries)
        line = {"model": model, "plan": plan, "price_version": version, **dict(zip(NUMBERS, numbers))}  # noqa: B905
        return {**line, "positions": {"first": entries[0][0], "last": entries[-1][0]}, "digest": digest}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every value with the path to it, as JSON: 1 and true are two things."""
    if value and isinstance(value, (dict, list)):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{path}.{name}")
    else:
        yield path, json.dumps(value)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def record_hash(row: Any) -> bytes:
    hashes = [sha256(event["json"]) if isinstance(event, dict) else event for event in row["events"]]
    if any(len(event) != 64 for event in hashes):
        raise ValueError("an event is neither JSON nor a hash")
    told = [row["stream"], row["sequence"], row["at_ns"], row["content"], "".join(hashes) or "-"]
    return bytes.fromhex(sha256(" ".join(map(str, [*told, row["subject"], row["writer"]]))))


def merkle_root(size: int, chosen: dict[int, bytes], nodes: list[str]) -> str:
    """Return the root (RFC 6962) over the chosen of `size` records and the nodes beside them."""
    wanted = sorted(chosen)
    given = iter(nodes)

    def root(low: int, high: int) -> bytes:
        at = bisect_left(wanted, low)
        if at == len(wanted) or wanted[at] >= high:
            return bytes.fromhex(next(given, ""))
        if high - low == 1:
            return hashlib.sha256(b"\0" + chosen[low]).digest()
        middle = low + (1 << ((high - low - 1).bit_length() - 1))
        return hashlib.sha256(b"\1" + root(low, middle) + root(middle, high)).digest()

    return root(0, size).hex() + "".join(given)  # a node that stays spoils it


def whole_seconds(spans: list[list[int]], older: list[list[int]]) -> int:
    """Return the time in which one of `spans` runs and none of `older`; each piece of it is rounded up."""
    steps = list[tuple[int, int]]()
    runs = 0
    since = 0
    seconds = 0
    for some, weight in (spans, 1), (older, -1 - len(spans)):  # below 0 whenever an older one runs
        steps += [(at, step) for span in some for at, step in zip(span, (weight, -weight))]  # noqa: B905
    for at, group in groupby(sorted(steps), lambda step: step[0]):
        before = runs
        runs = runs + sum(step for _, step in group)
        if before <= 0:
            since = at
        elif runs <= 0:
            seconds -= (since - at) // SECOND_NS
    return seconds


def main(folder: str = ".") -> int:
    audit = Audit(Path(folder))
    try:
        bill = audit.check()
    except NONSENSE as error:
        print(*audit.wrong, f"unreadable: {audit.at}: {error!r}", sep="\n", file=sys.stderr)
        return 2
    if audit.wrong:
        print("different:", *audit.wrong, sep="\n")
        return 1
    total = bill["total_nanousd"]
    usd = f"{'-' if total < 0 else ''}{abs(total) // 10**9}.{abs(total) % 10**9:09}"
    requests = sum(line["requests"] for line in bill["lines"] if line["plan"] != "correction")
    print(f"equal: account {audit.account}, period {audit.period} ({bill['status']}):", end=" ")
    print(f"{total} nano-USD ({usd} USD), {requests} requests, {audit.records} records")
    print(*(f"head: {name}:{audit.reached[name]} {head}" for name, head in bill["heads"].items()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
