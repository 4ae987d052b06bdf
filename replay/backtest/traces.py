"""Workloads: published traces in their own formats, and Rift's own log.

This module has one reader for each format, and thins a trace by client. It does not interpret traces.
Readers stream line by line, and their errors name the file and the line.
"""

import csv
import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import msgspec

from replay.backtest.simulator import TraceRequest
from replay.errors import ReplayError

# A larger time is in another unit, or infinite.
SECONDS_MAX = 1e11
FORMATS = ("azure", "mooncake", "servegen", "log")


class InvalidTrace(ReplayError):
    """A trace cannot be read; the message names the file, the line and the problem."""


class _Mooncake(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int


def read(path: Path, kind: str, *, thin: int = 1) -> list[TraceRequest]:
    """Return the requests of a file in order of time, starting at 0 s. Raises InvalidTrace, OSError.

    `thin` N keeps about one client in N: those whose name has a SHA-256 that is divisible by N. A client is
    kept with all of its requests or not at all, and every run keeps the same clients.
    """
    if kind not in READERS:
        raise InvalidTrace(f"{path}: the format {kind!r} is unknown; use one of {', '.join(READERS)}")
    if thin > 1 and kind != "servegen":
        raise InvalidTrace(
            f"{path}: a trace of format {kind} names no clients, so none can be left out (--thin)"
        )
    try:
        with _opened(path) as lines:
            found = list(READERS[kind](path, lines, thin))
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError, zlib.error, csv.Error) as error:
        raise InvalidTrace(f"{path}: {error}") from error
    return _from_zero(found, path)


def of_rows(rows: Iterable[tuple[int, int, int]]) -> list[TraceRequest]:
    """Return the requests of Rift's own log; a row is (accepted_at_ns, prompt_tokens, output_tokens).

    Raises InvalidTrace.
    """
    return _from_zero(
        [TraceRequest(at_ns / 1e9, prompt, max(1, output)) for at_ns, prompt, output in rows], "the log"
    )


def guessed(path: Path) -> str:
    """Return the format that a file's name implies. Raises InvalidTrace."""
    if path.suffix == ".jsonl":
        return "mooncake"
    if path.name.endswith((".csv", ".csv.gz")):
        with _opened(path) as lines:
            return "azure" if lines.readline().startswith("TIMESTAMP") else "servegen"
    raise InvalidTrace(f"{path}: say what it is with --trace-format: {', '.join(FORMATS)}")


def keeps(client: str, thin: int) -> bool:
    """Return whether thinning by `thin` keeps a client."""
    return int.from_bytes(hashlib.sha256(client.encode()).digest()) % thin == 0


def _azure(path: Path, lines: TextIO, thin: int) -> Iterator[TraceRequest]:
    """Columns: TIMESTAMP, ContextTokens, GeneratedTokens."""

    def seconds(text: str) -> float:
        # The fraction has seven digits, one more than datetime accepts.
        return datetime.fromisoformat(text[:26] + "+00:00").timestamp()

    for number, row in _rows(path, lines, ("TIMESTAMP", "ContextTokens", "GeneratedTokens")):
        yield _asked(path, number, seconds, row)


def _servegen(path: Path, lines: TextIO, thin: int) -> Iterator[TraceRequest]:
    """Columns: t_s, client, input_tokens, output_tokens; further columns are ignored."""
    clients: dict[str, bool] = {}
    for number, row in _rows(path, lines, ("t_s", "client", "input_tokens", "output_tokens")):
        kept = clients.get(row[1])
        if kept is None:
            kept = clients[row[1]] = keeps(row[1], thin)
        if kept:
            yield _asked(path, number, float, (row[0], row[2], row[3]))


def _mooncake(path: Path, lines: TextIO, thin: int) -> Iterator[TraceRequest]:
    """JSON lines: timestamp in ms, input_length, output_length."""
    decoder = msgspec.json.Decoder(_Mooncake)
    for number, line in enumerate(lines, start=1):
        try:
            one = decoder.decode(line)
        except msgspec.DecodeError as error:
            raise InvalidTrace(f"{path}:{number}: {error}") from error
        yield _asked(path, number, float, (one.timestamp / 1000, one.input_length, one.output_length))


READERS: dict[str, Callable[[Path, TextIO, int], Iterator[TraceRequest]]] = {
    "azure": _azure,
    "mooncake": _mooncake,
    "servegen": _servegen,
}


def _opened(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _rows(path: Path, lines: TextIO, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    rows = csv.reader(lines)
    header = next(rows, [])
    if header[: len(columns)] != list(columns):
        raise InvalidTrace(
            f"{path}:1: the columns are {','.join(header)!r}; expected are {','.join(columns)!r}"
        )
    for number, row in enumerate(rows, start=2):
        if len(row) < len(columns):
            raise InvalidTrace(f"{path}:{number}: {len(row)} values, expected are {len(columns)}")
        yield number, row


def _asked(path: Path, number: int, seconds: Callable[[Any], float], row: Sequence[Any]) -> TraceRequest:
    try:
        # A request without output tokens still costs its prefill.
        one = TraceRequest(seconds(row[0]), int(row[1]), max(1, int(row[2])))
    except ValueError as error:
        raise InvalidTrace(f"{path}:{number}: {error}") from error
    if not 0 <= one.at_s < SECONDS_MAX or one.prompt_tokens < 0:
        raise InvalidTrace(
            f"{path}:{number}: expected a time in seconds and a count, got {row[0]} and {row[1]}"
        )
    return one


def _from_zero(found: list[TraceRequest], where: Path | str) -> list[TraceRequest]:
    if not found:
        raise InvalidTrace(f"{where}: it contains no request")
    found.sort()
    first_s = found[0].at_s
    return [one._replace(at_s=one.at_s - first_s) for one in found]
