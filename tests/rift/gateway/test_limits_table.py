"""The table "What one account can hold" has the numbers and codes of the code."""

import re
import tracemalloc
from pathlib import Path

import pytest

from events import codec
from events.book import Book
from events.contracts import BODY_BYTES_MAX, LOG_KEPT_S, LOG_TRIM_S, MESSAGE_BYTES_MAX
from events.jetstream.streams import KEYS_FRACTION
from events.lifecycle import NEW
from events.schema import Logprob, Price, TokensGenerated
from rift import gateway
from rift.gateway import histories
from rift.gateway.admission import log_room, log_share, queue_share, rate_limits
from rift.gateway.admission.log_share import LogCapacity, LogShare
from rift.gateway.api import account_turns
from rift.gateway.asgi import body_budget, connections, parse_turns, request, server, strict_parser
from rift.gateway.completion import Completion
from rift.gateway.dialects.dialect import NATIVE
from rift.gateway.streams import delivery
from rift.settings import Settings
from tests.replay.conftest import Scribe

FOLDER = Path(next(iter(gateway.__path__)))
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("**What one account can hold.**")[2].partition("**Several gateways**")[0]
ROWS = [line.split(" | ") for line in SECTION.splitlines() if line.startswith("| ")]
LOG_BYTES = Settings().log_bytes_max


def row(begin: str) -> str:
    (found,) = [" | ".join(cells) for cells in ROWS if cells[0].startswith(f"| {begin}")]
    return found


def mib(size: float) -> str:
    return f"{size / 1024 / 1024:.0f} MiB"


def share(*accounts: str) -> LogShare:
    book = Book()
    book.accounts = dict.fromkeys(accounts, 0)
    keys = LOG_BYTES // KEYS_FRACTION
    return LogShare(LogCapacity(LOG_BYTES, keys, keys), book)


def test_the_numbers_are_those_of_the_code() -> None:
    alone, several = share("a"), share("a", "b")
    minute = [mib(one.bytes_per_minute("a") or 0) for one in (alone, several)]
    keys = [f"{one.idempotency_keys('a'):,}" for one in (alone, several)]
    content = [f"{one.content_keys('a'):,}" for one in (alone, several)]
    sizes = f"| {mib(NATIVE.body_bytes_max)} (`/v1/inference`), {mib(BODY_BYTES_MAX)} (other routes) |"
    assert sizes in row("a body")
    assert f"| {mib(MESSAGE_BYTES_MAX)}; sealed" in row("a request as it is stored")
    bodies = row("bodies being read")
    assert f"each at least {body_budget.BODY_BYTES_MIN // 1024} KiB |" in bodies
    assert f"| {mib(body_budget.ACCOUNT_BODIES_BYTES_MAX)} | {mib(body_budget.BODIES_BYTES_MAX)} |" in bodies
    assert bodies.endswith(f"after {body_budget.SOON_S} s |")
    pace = f"above {request.SLOW_BYTES // 1024} KiB also {request.BYTES_PER_S_MIN // 1024} KiB/s after"
    assert f"| {request.BODY_S:.0f} s; {pace} {request.SLOW_S:.0f} s |" in row("the time of a body")
    parsing = row("parsing of bodies")
    assert f"above {parse_turns.SMALL_BYTES // 1024} KiB |" in parsing
    assert f"a rest of {parse_turns.ACCOUNT_REST} times as long after each |" in parsing
    assert (parse_turns.REST, "| one at a time, with a rest as long" in parsing) == (1, True)
    stored = row("bytes stored per minute")
    assert f"| {minute[0]} if it is alone, else {minute[1]}, or" in stored
    assert f"the log less {mib(log_room.ROOM_BYTES_MIN)} |" in stored
    assert f"| {keys[0]} if it is alone, else {keys[1]}, or" in row("idempotency keys")
    assert f"| {content[0]} if it is alone, else {content[1]}, or" in row("content keys")
    for name in ("idempotency keys", "content keys"):
        assert f"| {mib(LOG_BYTES // KEYS_FRACTION)} |" in row(name)
    queue = f"| {queue_share.QUEUE_MAX:,}, and {mib(queue_share.QUEUE_BYTES_MAX)} |"
    assert queue in row("requests that wait")
    assert f"after {rate_limits.SOON_MS // 1000} s" in row("requests that wait")
    assert "| a quarter of the connections |" in row("clients that read")
    assert account_turns.READERS_SHARE == 4
    reads = row(f"reads of stored requests with more than {mib(histories.SHORT_BYTES)}")
    assert f"| {parse_turns.HISTORIES} at a time |" in reads
    assert (parse_turns.HISTORY_REST, "one at a time, with a rest as long" in reads) == (1, True)
    assert f"| {parse_turns.HISTORIES_WAITING} |" in row("clients that wait for such a read")
    assert f"| {account_turns.QUESTIONS_MAX} |" in row("questions")
    for name in ("clients that read", "clients that wait for such", "questions"):
        assert row(name).endswith(f"after {account_turns.RETRY_S} s |")
    assert delivery.REPORT_PAUSE_S == 1
    assert f"after {LOG_KEPT_S / 60:.0f} minutes, and is within {LOG_TRIM_S / 60:.0f} more" in SECTION
    assert f"fills the log in these {log_share.FILL_MINUTES} minutes" in SECTION
    assert log_share.ACCOUNT_PART == 4


def test_the_numbers_of_connections_are_those_of_the_code() -> None:
    most = (
        f"| {connections.CONNECTIONS_MAX:,}, or the limit of open files less {connections.FILES_RESERVED} |"
    )
    assert most in row("connections")
    assert f"for its client, at least {connections.WAIT_S_MIN} s, is closed" in row("connections")
    assert f"| {mib(connections.UNREAD_BYTES_MAX)} |" in row("bytes that wait")
    assert f"| {connections.HEAD_S} s, or {connections.KEEP_ALIVE_S} s after" in row("a connection without")
    head = f"| {strict_parser.HEAD_BYTES // 1024} KiB, {strict_parser.HEAD_LINES} lines and"
    assert f"{head} {connections.HEAD_S} s |" in row("the head of")
    unread = f"| {connections.WRITE_S} s for each {connections.WRITE_BYTES // 1024} KiB |"
    assert unread in row("an answer that a client")
    sizes = (connections.READ_BYTES, server.BODY_BYTES, connections.WRITE_BYTES)
    assert {size // 1024 for size in sizes} == {64}


def test_every_code_of_the_table_is_answered_by_the_gateway() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(FOLDER.rglob("*.py")))
    codes = re.findall(r"[45]\d\d `(\w+)`", SECTION)
    assert len(codes) > 10
    assert not [code for code in codes if f'"{code}"' not in source]


@pytest.mark.parametrize("top", [None, 0, 5, 20])
def test_an_answer_takes_the_memory_that_the_docs_say(top: int | None) -> None:
    figures = re.search(
        r"([0-9,]+) bytes for each token, ([0-9,]+) with logprobs, ([0-9,]+) with `top_logprobs: 5` and "
        r"([0-9,]+) with `top_logprobs: 20`",
        " ".join(README.split()),
    )
    assert figures is not None, "the README says it"
    expected = int(figures[{None: 1, 0: 2, 5: 3, 20: 4}[top]].replace(",", ""))
    records = [codec.encode("w", [tokens(index, top)]) for index in range(500)]
    scribe = Scribe()
    answer = Completion(
        scribe.accepted(scribe.request_id()),
        Price(model="tiny:1", prompt_nanousd=1, output_nanousd=1),
        keep_text=True,
    )
    tracemalloc.start()
    try:
        for record in records:
            for event in codec.decode(record)[1]:
                answer.add(event, NEW, 1)
        kept = tracemalloc.get_traced_memory()[0] / len(records)
    finally:
        tracemalloc.stop()
    assert 0.8 * expected < kept < 1.2 * expected


def tokens(index: int, top: int | None) -> TokensGenerated:
    def logprob(rank: int, likely: tuple[Logprob, ...] = ()) -> Logprob:
        return Logprob(token=f" word{rank}", logprob=-(index + rank) / 7, top=likely)

    shown = () if top is None else (logprob(0, tuple(logprob(rank) for rank in range(top))),)
    return TokensGenerated(attempt="a", index=index, token_ids=(index,), text=f" word{index}", logprobs=shown)
