"""What must hold of one request, and what is counted where it does not.

Pure: what a client received, what it asked for and what the log, the retrieval and the bill say go in;
counts come out. Nothing of Rift is imported here: the checker shares no rule with what it checks.

    lost         a token of the answer that the client never got
    duplicated   a token, or an end, that it got more than once
    reordered    a token that came after a later one
    unexplained  anything else; each with its sentence
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
    """One frame of a native stream; `at_s` is when its last byte came, by the client's clock."""

    id: int
    event: str
    data: dict[str, Any]
    at_s: float


class Expected(NamedTuple):
    """The answer token by token: what each adds to the text. The prompt's size is in tokens.

    `reasons` are the finish reasons, or codes of an error, that may end it; `charged` says whether
    its tokens cost anything.
    """

    pieces: Sequence[str]
    prompt_tokens: int
    reasons: frozenset[str] = frozenset({"length"})
    charged: bool = True

    def charge_nanousd(self, output_tokens: int) -> int:
        """The charge by the checker's own arithmetic: no output token, no charge."""
        if not self.charged or not output_tokens:
            return 0
        return self.prompt_tokens * PROMPT_NANOUSD + output_tokens * OUTPUT_NANOUSD

    def cut(self, told: "Told") -> "Expected":
        """The answer of a request that its client cancelled: what counted until then, or all of it.

        What control had to end costs nothing.
        """
        return self._replace(
            pieces=self.pieces[: told.tokens_counted],
            reasons=self.reasons | {"cancelled"},
            charged=told.ender != "control",
        )

    def poisoned(self, told: "Told") -> "Expected":
        """The answer of a request that no engine survived: what counted, at no charge."""
        return self._replace(
            pieces=self.pieces[: told.tokens_counted], reasons=frozenset({"poison"}), charged=False
        )


class Told(NamedTuple):
    """What the log tells of one request, as `ledger.py` folded it. A token event is (index, count, text)."""

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
    """Hold what came out of the client's socket, in its order, against the answer."""
    counts = Counts()
    arrived = arrivals(frames, expected.pieces, counts.unexplained.append)
    wanted, got = range(len(expected.pieces)), set(arrived)
    counts.lost = len(set(wanted) - got)
    counts.duplicated = len(arrived) - len(got)
    counts.reordered = _steps_back(arrived)
    if extra := got - set(wanted):
        counts.unexplained.append(f"tokens {sorted(extra)[:5]} are beyond the answer's end")
    _check_ids(frames, counts)
    _check_end(frames, expected, counts, received=len(got))
    return counts


def arrivals(frames: Sequence[Frame], pieces: Sequence[str], problem: Callable[[str], None]) -> list[int]:
    """Return the index of every token in the order of arrival. A frame may carry several tokens: it
    ends where the pieces have given its text, tokens without text that follow belong to it too."""
    tokens = [frame.data for frame in frames if frame.event == "token"]
    arrived: list[int] = []
    for at, token in enumerate(tokens):
        first: int = token["index"]
        until = _until(first, token["delta"], pieces)
        if until is None:
            problem(
                f"token {first} came as {token['delta']!r}, not as {''.join(pieces[first : first + 3])!r}…"
            )
            until = first + 1
        following = tokens[at + 1]["index"] if at + 1 < len(tokens) else len(pieces)
        while until < following and until < len(pieces) and not pieces[until]:
            until += 1
        arrived += range(first, until)
    return arrived


def _until(first: int, text: str, pieces: Sequence[str]) -> int | None:
    """Return the end of the shortest run of pieces from `first` that is `text`, if there is one."""
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
    """Return how many tokens came for the first time after a later one."""
    highest, seen, found = -1, set(), 0
    for index in arrived:
        found += index < highest and index not in seen
        highest = max(highest, index)
        seen.add(index)
    return found


def _check_ids(frames: Sequence[Frame], counts: Counts) -> None:
    for before, after in pairwise(frames):
        if after.id <= before.id:
            counts.unexplained.append(f"id {after.id} ({after.event}) came after id {before.id}")


def _check_end(frames: Sequence[Frame], expected: Expected, counts: Counts, *, received: int) -> None:
    ends = [at for at, frame in enumerate(frames) if frame.event in ENDS]
    if not ends:
        counts.unexplained.append("the stream never ended")
        return
    counts.duplicated += len(ends) - 1
    behind = [frame.event for frame in frames[ends[0] + 1 :] if frame.event not in ENDS]
    if behind:
        counts.unexplained.append(f"{len(behind)} frames came after the end: {behind[:3]}")
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
    """A stream read again from the start has the same token events and ids as it had live."""
    counts = Counts()
    live, later = (
        [(frame.id, frame.event, frame.data) for frame in stream if frame.event != "status"]
        for stream in (frames, again)
    )
    if live != later:
        differ = [pair for pair in zip(live, later, strict=False) if pair[0] != pair[1]]
        first = differ[0] if differ else "their lengths"
        counts.unexplained.append(
            f"read again, {len(later)} frames came instead of {len(live)}; they differ in {first}"
        )
    return counts


def check_retrieved(frames: Sequence[Frame], answer: dict[str, Any]) -> Counts:
    """`GET /v1/inference/{id}` says what the stream said."""
    counts = Counts()
    done = next((frame.data for frame in frames if frame.event == "done"), None)
    text = "".join(frame.data["delta"] for frame in frames if frame.event == "token")
    if answer.get("output") != text:
        counts.unexplained.append(f"retrieved, the output is {answer.get('output')!r}, not {text!r}")
    if done is not None:
        for name in ("finish_reason", "usage", "charge", "timing", "model", "created"):
            if answer.get(name) != done.get(name):
                counts.unexplained.append(
                    f"retrieved, {name} is {answer.get(name)}, in the stream {done.get(name)}"
                )
    return counts


def check_log(frames: Sequence[Frame], told: Told | None) -> Counts:
    """The client got the token events that count in the log, one frame for each, and nothing else."""
    counts = Counts()
    if told is None or told.accepted == 0:
        counts.unexplained.append("the log holds no acceptance of it")
        return counts
    received = [(frame.data["index"], frame.data["delta"]) for frame in frames if frame.event == "token"]
    logged = [(index, text) for index, _, text in told.tokens]
    if received != logged:
        counts.unexplained.append(
            f"the client got {len(received)} token frames, {len(logged)} token events count in the log"
        )
    if told.reason is None:
        counts.unexplained.append("it has not ended in the log")
    return counts


def check_row(request: str, row: dict[str, Any] | None, told: Told, *, charge: int) -> Counts:
    """The bill's row says what the log says, and charges what the client counted."""
    counts = Counts()
    if row is None:
        counts.unexplained.append(f"{request} has no row in `requests`")
        return counts
    if row["charge_nanousd"] != charge:
        counts.differing.append(f"{request}: billed {row['charge_nanousd']}, counted {charge}")
    facts = (told.reason, told.prompt_tokens, told.tokens_counted, told.attempts)
    billed = tuple(row[name] for name in ("finish_reason", "prompt_tokens", "output_tokens", "attempts"))
    if billed != facts:
        counts.unexplained.append(f"{request}: the row says {billed}, the log {facts}")
    return counts


def from_log(told: Told) -> Expected:
    """The answer as the log has it: for an engine whose text nobody can foretell."""
    pieces: list[str] = []
    for _, count, text in told.tokens:
        pieces += [text, *[""] * (count - 1)]
    return Expected(pieces, told.prompt_tokens, frozenset({"length", "stop"}))
