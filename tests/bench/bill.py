"""Bills a real workload: a trace becomes a log, an archive and invoices, and the auditor checks each invoice.

The auditor is the file that customers get, in its own process. A trace is CSV, optionally gzipped, with the
columns t_s, client, input_tokens and output_tokens; others are ignored.
"""

import csv
import gzip
import heapq
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from events import codec, ids, subjects
from events.contracts import SECOND_NS
from events.log import Stored
from events.schema import (
    AccountOpened,
    AnyEvent,
    AttemptStarted,
    Parameters,
    Price,
    PricePublished,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)
from events.subjects import BOOK, Address
from replay import audit_export, auditor
from replay.archive.archive import Archive
from replay.billing.invoice import Invoice, invoice
from replay.warehouse.rebuild import rebuild
from replay.warehouse.warehouse import Warehouse
from tests.bench import figures

PRICE = Price(model="deepseek-r1", prompt_nanousd=150, output_nanousd=400)
AT = Address(0, "lanebench", "deepseek-r1")
STREAM = subjects.shard_stream(0)
PERIOD = "2026-10"
START_NS = 1_790_812_800_000_000_000
# Events of a worker's record, and records of a segment.
GROUP = 28
SEGMENT = 50_000
# The time to the first token, including the queue, and the time of each further token.
FIRST_TOKEN_S = 0.4
TOKEN_S = 0.02


class Options(NamedTuple):
    trace: Path
    requests: int | None


class TraceEntry(NamedTuple):
    """`pieces` is the number of its token events."""

    at_s: float
    account: str
    prompt_tokens: int
    output_tokens: int
    pieces: int = 1


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    entries = list(read(options.trace))[: options.requests]
    say(f"{len(entries)} requests of {len({entry.account for entry in entries})} accounts")
    durations: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="rift-bench-") as name:
        folder = Path(name)
        archive = Archive(folder / "archive", key=b"bench")
        _timed(durations, "seal", say, lambda: _seal(archive, entries))
        _timed(durations, "rebuild", say, lambda: rebuild(archive, folder / "rift.duckdb"))
        warehouse = Warehouse.open(folder / "rift.duckdb")
        accounts = sorted({entry.account for entry in entries})
        bills = _timed(durations, "bill", say, lambda: [invoice(warehouse.read, a, PERIOD) for a in accounts])
        equal = _timed(durations, "audit", say, lambda: _audited(archive, warehouse, bills, folder))
        warehouse.close()
    total = sum(bill.total_nanousd for bill in bills)
    return {
        "machine": figures.machine(),
        "requests": len(entries),
        "accounts": len(accounts),
        "seconds": durations,
        "prompt_tokens": sum(entry.prompt_tokens for entry in entries),
        "output_tokens": sum(entry.output_tokens for entry in entries),
        "total_nanousd": total,
        "by_the_trace_nanousd": sum(
            entry.prompt_tokens * PRICE.prompt_nanousd + entry.output_tokens * PRICE.output_nanousd
            for entry in entries
        ),
        "audited_equal": equal,
    }


def read(trace: Path) -> Iterator[TraceEntry]:
    """Yield the trace. An entry without output tokens gets one, because empty answers are not charged."""
    with gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open() as file:
        for row in csv.DictReader(file):
            tokens = max(1, int(row["output_tokens"]))
            yield TraceEntry(float(row["t_s"]), f"client-{row['client']}", int(row["input_tokens"]), tokens)


def _timed(
    durations: dict[str, float], name: str, say: Callable[[str], None], work: Callable[[], Any]
) -> Any:
    began = time.monotonic()
    result = work()
    durations[name] = round(time.monotonic() - began, 1)
    say(f"{name}: {durations[name]} s")
    return result


def _seal(archive: Archive, entries: list[TraceEntry]) -> None:
    archive.seal(BOOK, [book_of(entries)], last=1)
    segment: list[Stored] = []
    for stored in records(entries):
        segment.append(stored)
        if len(segment) == SEGMENT:
            archive.seal(STREAM, segment, last=stored.sequence)
            segment = []
    if segment:
        archive.seal(STREAM, segment, last=segment[-1].sequence)


def book_of(entries: list[TraceEntry]) -> Stored:
    events: list[AnyEvent] = [
        AccountOpened(id=f"account.{account}", account=account)
        for account in sorted({entry.account for entry in entries})
    ]
    events.append(PricePublished(id="price.1", version=1, prices=(PRICE,)))
    return Stored("rift.book.all.all", 1, START_NS, codec.encode("bench", events))


def records(entries: list[TraceEntry], *, first: int = 0) -> Iterator[Stored]:
    """Yield the log: one record for each acceptance, and records of GROUP events for the workers.

    Request ids are numbered from `first`.
    """
    sequence = 0
    group: list[AnyEvent] = []
    for at_s, event in _events(entries, first):
        is_accepted = isinstance(event, RequestAccepted)
        if not is_accepted:
            group.append(event)
            if len(group) < GROUP:
                continue
        events, subject = ([event], subjects.request(AT)) if is_accepted else (group, subjects.work(AT))
        sequence += 1
        at_ns = START_NS + int(at_s * SECOND_NS)
        yield Stored(subject, sequence, at_ns, codec.encode("bench", events))
        if not is_accepted:
            group = []
    if group:
        yield Stored(subjects.work(AT), sequence + 1, at_ns, codec.encode("bench", group))


def _events(entries: list[TraceEntry], first: int) -> Iterator[tuple[float, AnyEvent]]:
    """Yield the events of all requests in the order of their times."""
    waiting: list[tuple[float, int, AnyEvent]] = []
    number = 0
    for index, entry in enumerate(entries, first):
        while waiting and waiting[0][0] <= entry.at_s:
            at_s, _, event = heapq.heappop(waiting)
            yield at_s, event
        accepted, started, *tokens, finished = _life(index, entry)
        yield entry.at_s, accepted
        heapq.heappush(waiting, (entry.at_s, number, started))
        piece_s = entry.output_tokens * TOKEN_S / entry.pieces
        for place, event in enumerate((*tokens, finished)):
            heapq.heappush(waiting, (entry.at_s + FIRST_TOKEN_S + place * piece_s, number + place + 1, event))
        number += len(tokens) + 2
    while waiting:
        at_s, _, event = heapq.heappop(waiting)
        yield at_s, event


def _life(index: int, entry: TraceEntry) -> list[AnyEvent]:
    entropy = index.to_bytes(ids.RANDOM_BYTES, "big")
    request = ids.new_request_id(secret=b"bench", account=entry.account, at=AT, floor=0, entropy=entropy)
    attempt = ids.new_attempt_id(entropy)
    accepted = RequestAccepted(
        request=request,
        account=entry.account,
        key="key",
        model=PRICE.model,
        kind="inference",
        input="",
        parameters=Parameters(),
        stream=True,
        prompt_tokens_max=163_840,
        deadline_ms=600_000,
        price_version=1,
        book=1,
    )
    started = AttemptStarted(
        request=request,
        attempt=attempt,
        after=None,
        resume_index=0,
        worker=f"worker-{index % 16}",
        prompt_tokens=entry.prompt_tokens,
        accepted_at_ns=START_NS + int(entry.at_s * SECOND_NS),
        engine="vllm",
        model_digest="d",
        delivery="",
    )
    bounds = [entry.output_tokens * piece // entry.pieces for piece in range(entry.pieces + 1)]
    tokens = [
        TokensGenerated(attempt=attempt, index=low, token_ids=(0,) * (high - low), text="")
        for low, high in pairwise(bounds)
    ]
    finished = RequestFinished(
        request=request, attempt=attempt, reason="stop", output_tokens=entry.output_tokens
    )
    return [accepted, started, *tokens, finished]


def _audited(archive: Archive, warehouse: Warehouse, bills: list[Invoice], folder: Path) -> int:
    """Export every bill, run the auditor on it, and return how many bills it confirms."""
    equal = 0
    for number, bill in enumerate(bills):
        export = folder / f"export-{number}"
        [charges] = warehouse.read(
            ("select request_id, sequence from charges where account = ?", [bill.account])
        )
        audit_export.export(archive, msgspec.to_builtins(bill), dict(charges.rows), export, {})
        ran = subprocess.run(
            [sys.executable, auditor.__file__, str(export)], capture_output=True, check=False
        )
        equal += ran.returncode == 0
        for file in export.iterdir():
            file.unlink()
    return equal
