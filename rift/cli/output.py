"""How commands print lists, tables, money and times."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from events.contracts import SECOND_NS
from events.money import usd
from replay.warehouse.result import QueryResult
from rift.errors import RiftError, first_error, printable

# How a table writes the values of a column, by the column's name.
Formats = dict[str, Callable[[Any], str | None]]


class CommandFailed(RiftError):
    """The command failed; the message gives the reason and the remedy."""


def print_result(result: QueryResult, *, as_json: bool) -> None:
    """Print a query's result. Raises CommandFailed for JSON if two columns have the same name."""
    if not as_json:
        print(table(result.columns, result.rows))
        return
    if duplicates := [name for name in result.columns if result.columns.count(name) > 1]:
        raise CommandFailed(f"two columns are named {duplicates[0]!r}; rename one with `as`")
    rows = [dict(zip(result.columns, row, strict=True)) for row in result.rows]
    print(_json(rows))


def print_answer(result: QueryResult, *, as_json: bool) -> None:
    """Print a query's result with times and money as text, unless as JSON."""
    units = {"_nanousd": money, "_at_ns": utc_time}
    formats: Formats = {
        name: write for name in result.columns for unit, write in units.items() if name.endswith(unit)
    }
    rows = [dict(zip(result.columns, row, strict=True)) for row in result.rows]
    print_list(rows, as_json=as_json, formats=formats)


def print_list(lines: Sequence[Mapping[str, Any]], *, as_json: bool, formats: Formats) -> None:
    """Print lines that all have the same fields. A table drops the unit from a field's name."""
    if as_json:
        print(_json(lines))
        return
    columns = [re.sub("_(nanousd|at_ns)$", "", name) for name in lines[0]] if lines else ["nothing yet"]
    rows = [
        [formats[name](value) if name in formats else value for name, value in line.items()] for line in lines
    ]
    print(table(columns, rows))


def _json(value: object) -> str:
    """Return JSON in one line, without control characters: JSON leaves U+007F to U+009F as they are."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def first_message(group: BaseExceptionGroup[Any]) -> str:
    return str(first_error(group))


def money(nanousd: int | None) -> str | None:
    return None if nanousd is None else usd(nanousd)


def utc_time(time_ns: int | None) -> str | None:
    return (
        None if time_ns is None else f"{datetime.fromtimestamp(time_ns // SECOND_NS, UTC):%Y-%m-%dT%H:%M:%SZ}"
    )


def positions(applied: Mapping[str, int]) -> str:
    """Write the last sequence of each stream, like `RIFT_0:812`."""
    return ", ".join(f"{stream}:{sequence}" for stream, sequence in sorted(applied.items()))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return columns under their names, numbers right-aligned."""
    columns = [printable(name) for name in columns]
    texts = [["" if value is None else printable(str(value)) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    numeric = [all(isinstance(row[index], int | float) for row in rows) for index in range(len(widths))]
    lines = [columns, ["-" * width for width in widths], *texts]
    return "\n".join(
        "  ".join(
            text.rjust(width) if is_numeric else text.ljust(width)
            for text, width, is_numeric in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )
