"""Workloads: published traces in their own formats, and Rift's own log.

This module has one reader for each format, and thins a trace by client. It does not interpret traces.
Readers stream line by line, and their errors name the file and the line.
"""

import codecs
import csv
import gzip
import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import msgspec

from replay.backtest.simulator import TraceRequest
from replay.errors import ReplayError

# A larger time is in another unit, or infinite.
SECONDS_MAX = 1e11
# More tokens than any context has: the simulation of such a request would not end.
TOKENS_MAX = 1 << 24
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
SERVEGEN_COLUMNS = ("t_s", "client", "input_tokens", "output_tokens")
# Spreadsheets separate with semicolons where a comma marks the fraction.
DELIMITERS = ",;\t"
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
    with _opened(path) as lines:
        found = list(READERS[kind](path, lines, thin))
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
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson")):
        return "mooncake"
    if name.endswith(".csv"):
        with _opened(path) as lines:
            _, header = _csv(lines)
            return "azure" if AZURE_COLUMNS[0].casefold() in header else "servegen"
    raise InvalidTrace(f"{path}: say what it is with --trace-format: {', '.join(FORMATS)}")


def keeps(client: str, thin: int) -> bool:
    """Return whether thinning by `thin` keeps a client."""
    return int.from_bytes(hashlib.sha256(client.encode()).digest()) % thin == 0


def _azure(path: Path, lines: TextIO, thin: int) -> Iterator[TraceRequest]:
    """AZURE_COLUMNS; a time without a zone is UTC."""

    def seconds(text: str) -> float:
        iso = text.removesuffix("UTC").rstrip().replace(" +", "+").replace(" -", "-")
        at = datetime.fromisoformat(iso)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()

    for number, (at, prompt, output) in _rows(path, lines, AZURE_COLUMNS):
        yield _asked(path, number, seconds, (at, prompt, output), AZURE_COLUMNS[1:])


def _servegen(path: Path, lines: TextIO, thin: int) -> Iterator[TraceRequest]:
    """SERVEGEN_COLUMNS."""
    clients: dict[str, bool] = {}
    for number, (at, client, prompt, output) in _rows(path, lines, SERVEGEN_COLUMNS):
        kept = clients.get(client)
        if kept is None:
            kept = clients[client] = keeps(client, thin)
        if kept:
            yield _asked(path, number, float, (at, prompt, output), SERVEGEN_COLUMNS[2:])


def _mooncake(path: Path, lines: TextIO, thin: int) -> Iterator[TraceRequest]:
    """JSON lines: timestamp in ms, input_length, output_length."""
    # Some writers quote numbers.
    names = ("input_length", "output_length")
    decoder = msgspec.json.Decoder(_Mooncake, strict=False)
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            one = decoder.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidTrace(f"{path}:{number}: {error}") from error
        yield _asked(path, number, float, (one.timestamp / 1000, one.input_length, one.output_length), names)


READERS: dict[str, Callable[[Path, TextIO, int], Iterator[TraceRequest]]] = {
    "azure": _azure,
    "mooncake": _mooncake,
    "servegen": _servegen,
}


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Open a file as text, UTF-8 unless a mark says UTF-16. Raises InvalidTrace, also while it is read."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            is_utf16 = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            yield TextIOWrapper(file, encoding="utf-16" if is_utf16 else "utf-8-sig", newline="")
    except (EOFError, gzip.BadGzipFile, UnicodeError, zlib.error, csv.Error) as error:
        raise InvalidTrace(f"{path}: {error}") from error


def _csv(lines: TextIO) -> tuple[Iterator[tuple[int, list[str]]], list[str]]:
    """Return the rows that are not blank, each with its last line number, and the lower-case header. Between
    semicolons a comma is a point."""
    blank, first = 0, ""
    for first in lines:
        if not first.isspace():
            break
        blank += 1
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, skipinitialspace=True)
    comma = "." if delimiter == ";" else ","
    rows = ((blank + reader.line_num, [value.strip().replace(",", comma) for value in row]) for row in reader)
    filled = ((number, row) for number, row in rows if any(row))
    _, header = next(filled, (1, []))
    return filled, [name.casefold() for name in header]


def _rows(path: Path, lines: TextIO, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the named columns of each row; their order is free, and further columns are ignored."""
    rows, header = _csv(lines)
    try:
        indexes = [header.index(name.casefold()) for name in columns]
    except ValueError as error:
        raise InvalidTrace(
            f"{path}:1: the columns are {','.join(header)!r}; expected are {','.join(columns)!r}"
        ) from error
    for number, row in rows:
        if len(row) <= max(indexes):
            raise InvalidTrace(f"{path}:{number}: {len(row)} values, expected are {max(indexes) + 1}")
        yield number, [row[index] for index in indexes]


def _asked(
    path: Path, number: int, seconds: Callable[[Any], float], row: Sequence[Any], names: Sequence[str]
) -> TraceRequest:
    """`names` are those of the two counts, for messages."""
    try:
        prompt, output = map(_count, row[1:], names)
        # A request without output tokens still costs its prefill.
        one = TraceRequest(seconds(row[0]), prompt, max(1, output))
    except ValueError as error:
        raise InvalidTrace(f"{path}:{number}: {error}") from error
    if not 0 <= one.at_s < SECONDS_MAX:
        raise InvalidTrace(f"{path}:{number}: expected a time in seconds, got {row[0]}")
    return one


def _count(value: Any, name: str) -> int:
    """Return a count. Programs write those of a column with gaps as 12.0. Raises ValueError."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not number.is_integer() or not 0 <= number <= TOKENS_MAX:
        raise ValueError(f"{name} must be a whole number from 0 to {TOKENS_MAX}, got {value!r}")
    return int(number)


def _from_zero(found: list[TraceRequest], where: Path | str) -> list[TraceRequest]:
    if not found:
        raise InvalidTrace(f"{where}: it contains no request")
    found.sort()
    first_s = found[0].at_s
    return [one._replace(at_s=one.at_s - first_s) for one in found]
