"""Check one request, and count each violation.

Pure functions: they compare what a client received with the expected answer, the log, the fetched object and
the bill. This module imports nothing of Rift, so the checker shares no rule with the code that it checks.

    lost         tokens of the answer that the client never received
    duplicated   tokens, or ends, that it received more than once
    reordered    tokens that it received after a later one
    unexplained  anything else, as one sentence each
    differing    requests whose charge is not the same everywhere
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

PROMPT_NANOUSD = 10
OUTPUT_NANOUSD = 20
ENDS = ("done", "error")


class Frame(NamedTuple):
    """One frame of a native stream; `at_s` is when its last byte arrived, by the client's clock."""

    id: int
    event: str
    data: dict[str, Any]
    at_s: float


class Expected(NamedTuple):
    """The expected answer: the text that each token adds, and the number of prompt tokens.

    `reasons` are the finish reasons and error codes that may end it. Unless `charged`, its tokens are free.
    """

    pieces: Sequence[str]
    prompt_tokens: int
    reasons: frozenset[str] = frozenset({"length"})
    charged: bool = True

    def charge_nanousd(self, output_tokens: int) -> int:
        """Return the charge by the checker's own arithmetic: without output tokens it is 0."""
        if not self.charged or not output_tokens:
            return 0
        return self.prompt_tokens * PROMPT_NANOUSD + output_tokens * OUTPUT_NANOUSD

    def cut(self, logged: "LoggedRequest") -> "Expected":
        """Return the answer of a cancelled request: the counted tokens, which may be all of them.

        If control had to end the request, it is free.
        """
        return self._replace(
            pieces=self.pieces[: logged.tokens_counted],
            reasons=self.reasons | {"cancelled"},
            charged=logged.ender != "control",
        )

    def poisoned(self, logged: "LoggedRequest") -> "Expected":
        """Return the answer of a request that ended every engine: the counted tokens, free of charge."""
        return self._replace(
            pieces=self.pieces[: logged.tokens_counted], reasons=frozenset({"poison"}), charged=False
        )


class LoggedRequest(NamedTuple):
    """One request as `ledger.py` folded it from the log. A token event is (index, count, text)."""

    accepted: int
    tokens: Sequence[tuple[int, int, str]]
    prompt_tokens: int
    attempts: int
    reason: str | None
    ender: str | None = "worker"

    @property
    def tokens_counted(self) -> int:
        return sum(count for _, count, _ in self.tokens)


@dataclass
class Counts:
    lost: int = 0
    duplicated: int = 0
    reordered: int = 0
    unexplained: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Counts") -> "Counts":
        self.lost += other.lost
        self.duplicated += other.duplicated
        self.reordered += other.reordered
        self.unexplained += other.unexplained
        self.differing += other.differing
        return self

    @property
    def clean(self) -> bool:
        return not (self.lost or self.duplicated or self.reordered or self.unexplained or self.differing)

    def line(self, cycles: int) -> str:
        charges = f"{len(self.differing)} charges differ" if self.differing else "charges equal"
        return (
            f"{cycles} cycles, {self.lost} lost, {self.duplicated} duplicated, {self.reordered} reordered, "
            f"{len(self.unexplained)} unexplained, {charges}"
        )


def check_stream(frames: Sequence[Frame], expected: Expected) -> Counts:
    """Compare the frames, in the order of arrival, with the expected answer."""
    counts = Counts()
    arrived = arrivals(frames, expected.pieces, counts.unexplained.append)
    expected_tokens = range(len(expected.pieces))
    received = set(arrived)
    counts.lost = len(set(expected_tokens) - received)
    counts.duplicated = len(arrived) - len(received)
    counts.reordered = _steps_back(arrived)
    if extra := received - set(expected_tokens):
        counts.unexplained.append(f"tokens {sorted(extra)[:5]} are beyond the answer's end")
    _check_ids(frames, counts)
    _check_end(frames, expected, counts, received=len(received))
    return counts


def arrivals(frames: Sequence[Frame], pieces: Sequence[str], problem: Callable[[str], None]) -> list[int]:
    """Return the index of every token in the order of arrival.

    A frame may hold several tokens: those whose pieces make up its text, and any tokens without text after
    them.
    """
    tokens = [frame.data for frame in frames if frame.event == "token"]
    arrived: list[int] = []
    for at, token in enumerate(tokens):
        first: int = token["index"]
        until = _until(first, token["delta"], pieces)
        if until is None:
            problem(
                f"token {first} arrived as {token['delta']!r}, not as {''.join(pieces[first : first + 3])!r}…"
            )
            until = first + 1
        following = tokens[at + 1]["index"] if at + 1 < len(tokens) else len(pieces)
        while until < following and until < len(pieces) and not pieces[until]:
            until += 1
        arrived += range(first, until)
    return arrived


def _until(first: int, text: str, pieces: Sequence[str]) -> int | None:
    """Return the end of the shortest run of pieces from `first` that make up `text`, or None."""
    at, rest = first, text
    while at < len(pieces):
        if not rest.startswith(pieces[at]):
            return None
        rest = rest[len(pieces[at]) :]
        at += 1
        if not rest:
            return at
    return None


def _steps_back(arrived: Sequence[int]) -> int:
    """Return how many tokens arrived for the first time after a later one."""
    highest = -1
    seen = set()
    count = 0
    for index in arrived:
        count += index < highest and index not in seen
        highest = max(highest, index)
        seen.add(index)
    return count


def _check_ids(frames: Sequence[Frame], counts: Counts) -> None:
    for before, after in pairwise(frames):
        if after.id <= before.id:
            counts.unexplained.append(f"id {after.id} ({after.event}) arrived after id {before.id}")


def _check_end(frames: Sequence[Frame], expected: Expected, counts: Counts, *, received: int) -> None:
    ends = [at for at, frame in enumerate(frames) if frame.event in ENDS]
    if not ends:
        counts.unexplained.append("the stream never ended")
        return
    counts.duplicated += len(ends) - 1
    late = [frame.event for frame in frames[ends[0] + 1 :] if frame.event not in ENDS]
    if late:
        counts.unexplained.append(f"{len(late)} frames arrived after the end: {late[:3]}")
    event, end = frames[ends[0]].event, frames[ends[0]].data
    if event == "error":
        code = end["error"]["code"]
        if code not in expected.reasons:
            counts.unexplained.append(f"the stream ended with the error {code}: {end['error']['message']}")
        return
    if end["finish_reason"] not in expected.reasons:
        counts.unexplained.append(f"finish_reason is {end['finish_reason']}")
    usage = {
        "prompt_tokens": expected.prompt_tokens,
        "output_tokens": received,
        "total_tokens": expected.prompt_tokens + received,
    }
    if end["usage"] != usage:
        counts.unexplained.append(f"usage is {end['usage']}, the client counted {usage}")
    charge = expected.charge_nanousd(received)
    if end["charge"]["nanousd"] != charge:
        counts.differing.append(f"{end['id']}: charged {end['charge']['nanousd']}, counted {charge}")


def check_replay(frames: Sequence[Frame], again: Sequence[Frame]) -> Counts:
    """Check that a replay from the start has the same events and ids as the live stream."""
    counts = Counts()
    live, later = (
        [(frame.id, frame.event, frame.data) for frame in stream if frame.event != "status"]
        for stream in (frames, again)
    )
    if live != later:
        differ = [pair for pair in zip(live, later, strict=False) if pair[0] != pair[1]]
        first = differ[0] if differ else "their lengths"
        counts.unexplained.append(
            f"the replay has {len(later)} frames instead of {len(live)}; they differ in {first}"
        )
    return counts


def check_retrieved(frames: Sequence[Frame], answer: dict[str, Any]) -> Counts:
    """Check that `GET /v1/inference/{id}` returns the same answer as the stream."""
    counts = Counts()
    done = next((frame.data for frame in frames if frame.event == "done"), None)
    text = "".join(frame.data["delta"] for frame in frames if frame.event == "token")
    if answer.get("output") != text:
        counts.unexplained.append(f"the fetched output is {answer.get('output')!r}, not {text!r}")
    if done is not None:
        for name in ("finish_reason", "usage", "charge", "timing", "model", "created"):
            if answer.get(name) != done.get(name):
                counts.unexplained.append(
                    f"the fetched {name} is {answer.get(name)}, in the stream {done.get(name)}"
                )
    return counts


def check_log(frames: Sequence[Frame], logged: LoggedRequest | None) -> Counts:
    """Check that the client received one frame for each token event that counts in the log."""
    counts = Counts()
    if logged is None or logged.accepted == 0:
        counts.unexplained.append("the log holds no acceptance")
        return counts
    received = [(frame.data["index"], frame.data["delta"]) for frame in frames if frame.event == "token"]
    stored = [(index, text) for index, _, text in logged.tokens]
    if received != stored:
        counts.unexplained.append(
            f"the client received {len(received)} token frames, {len(stored)} token events count in the log"
        )
    if logged.reason is None:
        counts.unexplained.append("the request has not ended in the log")
    return counts


def check_row(request: str, row: dict[str, Any] | None, logged: LoggedRequest, *, charge: int) -> Counts:
    """Check that the bill's row agrees with the log, and charges the tokens that the client counted."""
    counts = Counts()
    if row is None:
        counts.unexplained.append(f"{request} has no row in `requests`")
        return counts
    if row["charge_nanousd"] != charge:
        counts.differing.append(f"{request}: billed {row['charge_nanousd']}, counted {charge}")
    facts = (logged.reason, logged.prompt_tokens, logged.tokens_counted, logged.attempts)
    billed = tuple(row[name] for name in ("finish_reason", "prompt_tokens", "output_tokens", "attempts"))
    if billed != facts:
        counts.unexplained.append(f"{request}: the row has {billed}, the log {facts}")
    return counts


def from_log(logged: LoggedRequest) -> Expected:
    """Return the answer as the log has it, for an engine whose text cannot be predicted."""
    pieces: list[str] = []
    for _, count, text in logged.tokens:
        pieces += [text, *[""] * (count - 1)]
    return Expected(pieces, logged.prompt_tokens, frozenset({"length", "stop"}))
