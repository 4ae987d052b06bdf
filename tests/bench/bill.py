"""The bills of a real workload: the trace becomes a log, the log an archive, the archive invoices, and each
of these is audited by the file that customers get, in a process of its own.

A trace is CSV, packed or not: t_s, client, input_tokens, output_tokens, and whatever else.
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
PERIOD, START_NS, SECOND_NS = "2026-10", 1_790_812_800_000_000_000, 1_000_000_000
# Events of a worker's record, and records of a segment.
CROWD, SEGMENT = 28, 50_000
# A request waits and fills its prompt for so long, and then says a token every so often.
FIRST_TOKEN_S, TOKEN_S = 0.4, 0.02


class Options(NamedTuple):
    trace: Path
    requests: int | None


class Asked(NamedTuple):
    """`pieces` is how many events its tokens come in."""

    at_s: float
    account: str
    prompt_tokens: int
    output_tokens: int
    pieces: int = 1


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    asked = list(read(options.trace))[: options.requests]
    say(f"{len(asked)} requests of {len({one.account for one in asked})} accounts")
    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="rift-bench-") as name:
        folder = Path(name)
        archive = Archive(folder / "archive", key=b"bench")
        _timed(took, "seal", say, lambda: _seal(archive, asked))
        _timed(took, "rebuild", say, lambda: rebuild(archive, folder / "rift.duckdb"))
        warehouse = Warehouse.open(folder / "rift.duckdb")
        accounts = sorted({one.account for one in asked})
        bills = _timed(took, "bill", say, lambda: [invoice(warehouse.read, a, PERIOD) for a in accounts])
        equal = _timed(took, "audit", say, lambda: _audited(archive, warehouse, bills, folder))
        warehouse.close()
    total = sum(bill.total_nanousd for bill in bills)
    return {
        "machine": figures.machine(),
        "requests": len(asked),
        "accounts": len(accounts),
        "seconds": took,
        "prompt_tokens": sum(one.prompt_tokens for one in asked),
        "output_tokens": sum(one.output_tokens for one in asked),
        "total_nanousd": total,
        "by_the_trace_nanousd": sum(
            one.prompt_tokens * PRICE.prompt_nanousd + one.output_tokens * PRICE.output_nanousd
            for one in asked
        ),
        "audited_equal": equal,
    }


def read(trace: Path) -> Iterator[Asked]:
    """What of the trace says no token is asked for one, since nothing else would be charged."""
    with gzip.open(trace, "rt") if trace.suffix == ".gz" else trace.open() as file:
        for row in csv.DictReader(file):
            tokens = max(1, int(row["output_tokens"]))
            yield Asked(float(row["t_s"]), f"client-{row['client']}", int(row["input_tokens"]), tokens)


def _timed(took: dict[str, float], name: str, say: Callable[[str], None], work: Callable[[], Any]) -> Any:
    began = time.monotonic()
    found = work()
    took[name] = round(time.monotonic() - began, 1)
    say(f"{name}: {took[name]} s")
    return found


def _seal(archive: Archive, asked: list[Asked]) -> None:
    archive.seal(BOOK, [book_of(asked)], last=1)
    segment: list[Stored] = []
    for stored in records(asked):
        segment.append(stored)
        if len(segment) == SEGMENT:
            archive.seal(STREAM, segment, last=stored.sequence)
            segment = []
    if segment:
        archive.seal(STREAM, segment, last=segment[-1].sequence)


def book_of(asked: list[Asked]) -> Stored:
    events: list[AnyEvent] = [
        AccountOpened(id=f"account.{account}", account=account)
        for account in sorted({one.account for one in asked})
    ]
    events.append(PricePublished(id="price.1", version=1, prices=(PRICE,)))
    return Stored("rift.book.all.all", 1, START_NS, codec.encode("bench", events))


def records(asked: list[Asked], *, first: int = 0) -> Iterator[Stored]:
    """Yield the log: an acceptance as it comes, and what workers say in records of a crowd.

    `first` numbers the requests, for ids of their own.
    """
    sequence = 0
    crowd: list[AnyEvent] = []
    for at_s, event in _events(asked, first):
        is_accepted = isinstance(event, RequestAccepted)
        if not is_accepted:
            crowd.append(event)
            if len(crowd) < CROWD:
                continue
        told, subject = ([event], subjects.request(AT)) if is_accepted else (crowd, subjects.work(AT))
        sequence += 1
        at_ns = START_NS + int(at_s * SECOND_NS)
        yield Stored(subject, sequence, at_ns, codec.encode("bench", told))
        if not is_accepted:
            crowd = []
    if crowd:
        yield Stored(subjects.work(AT), sequence + 1, at_ns, codec.encode("bench", crowd))


def _events(asked: list[Asked], first: int) -> Iterator[tuple[float, AnyEvent]]:
    """Yield the events of all requests in the order of their times."""
    waiting: list[tuple[float, int, AnyEvent]] = []
    number = 0
    for index, one in enumerate(asked, first):
        while waiting and waiting[0][0] <= one.at_s:
            at_s, _, event = heapq.heappop(waiting)
            yield at_s, event
        accepted, started, *tokens, finished = _life(index, one)
        yield one.at_s, accepted
        heapq.heappush(waiting, (one.at_s, number, started))
        piece_s = one.output_tokens * TOKEN_S / one.pieces
        for place, event in enumerate((*tokens, finished)):
            heapq.heappush(waiting, (one.at_s + FIRST_TOKEN_S + place * piece_s, number + place + 1, event))
        number += len(tokens) + 2
    while waiting:
        at_s, _, event = heapq.heappop(waiting)
        yield at_s, event


def _life(index: int, one: Asked) -> list[AnyEvent]:
    entropy = index.to_bytes(ids.RANDOM_BYTES, "big")
    request = ids.new_request_id(secret=b"bench", account=one.account, at=AT, floor=0, entropy=entropy)
    attempt = ids.new_attempt_id(entropy)
    accepted = RequestAccepted(
        request=request,
        account=one.account,
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
        prompt_tokens=one.prompt_tokens,
        accepted_at_ns=START_NS + int(one.at_s * SECOND_NS),
        engine="vllm",
        model_digest="d",
        delivery="",
    )
    bounds = [one.output_tokens * piece // one.pieces for piece in range(one.pieces + 1)]
    tokens = [
        TokensGenerated(attempt=attempt, index=low, token_ids=(0,) * (high - low), text="")
        for low, high in pairwise(bounds)
    ]
    finished = RequestFinished(
        request=request, attempt=attempt, reason="stop", output_tokens=one.output_tokens
    )
    return [accepted, started, *tokens, finished]


def _audited(archive: Archive, warehouse: Warehouse, bills: list[Invoice], folder: Path) -> int:
    """Export every bill, have the auditor check it, and return how many it found equal."""
    equal = 0
    for number, bill in enumerate(bills):
        export = folder / f"export-{number}"
        [found] = warehouse.read(
            ("select request_id, sequence from charges where account = ?", [bill.account])
        )
        audit_export.export(archive, msgspec.to_builtins(bill), dict(found.rows), export)
        ran = subprocess.run(
            [sys.executable, auditor.__file__, str(export)], capture_output=True, check=False
        )
        equal += ran.returncode == 0
        for file in export.iterdir():
            file.unlink()
    return equal
