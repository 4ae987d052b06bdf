"""Questions, `rift sql` and `rift quarantine`; and how lists and failures are shown."""

import json
from argparse import Namespace
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import anyio

from events.contracts import SECOND_NS
from events.jetstream import JetStream
from events.log import LogError
from events.money import usd
from replay.warehouse.result import QueryRefused, QueryResult
from replay.warehouse.warehouse import Warehouse, WarehouseError
from rift import book_admin
from rift.cli.connection import connected, installation
from rift.control.projection.time_travel import parse as parse_position
from rift.errors import RiftError
from rift.rpc import TIMEOUT_S, AnyQuestion, QuestionRefused, Sql, ask_leader

Result = TypeVar("Result")
# How a table writes the values of a name.
Shown = dict[str, Callable[[Any], str | None]]


class CommandFailed(RiftError):
    """The command could not be done; the message says why."""


def sql(options: Namespace) -> None:
    """Ask the control process; where no broker answers, the database file itself."""
    try:
        try:
            answer = QueryResult(**with_log(options, lambda log: ask_leader(log, Sql(options.select))))
        except* LogError as nobody:
            answer = _from_file(options, nobody)
    except* (QueryRefused, QuestionRefused, WarehouseError) as refused:
        raise CommandFailed(first_of(refused)) from refused
    show(answer, as_json=options.json)


def show(answer: QueryResult, *, as_json: bool) -> None:
    """Print an answer. Raises CommandFailed where JSON cannot hold it."""
    if not as_json:
        print(table(answer))
        return
    if twice := [name for name in answer.columns if answer.columns.count(name) > 1]:
        raise CommandFailed(f"two columns are called {twice[0]!r}; name them apart with `as`")
    rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
    print(json.dumps(rows, ensure_ascii=False))


def _from_file(options: Namespace, nobody: BaseExceptionGroup[LogError]) -> QueryResult:
    found = installation(options)
    if options.nats or not found.database.exists():
        raise CommandFailed(first_of(nobody))
    warehouse = Warehouse.open(found.database)
    try:
        return warehouse.query(options.select)
    finally:
        warehouse.close()


def quarantine(options: Namespace) -> None:
    """Have all readers pass over a record that none can read."""
    position = parse_position(options.position)

    async def add(log: JetStream) -> None:
        await book_admin.quarantine(log, position.stream, position.sequence, options.reason)

    with_log(options, add)
    print(f"{position.stream}:{position.sequence} is passed over from now on")


def with_log(options: Namespace, ask: Callable[[JetStream], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        async with connected(options, "cli") as log:
            return await ask(log)

    return anyio.run(run, backend_options={"use_uvloop": True})


async def asked(log: JetStream, question: AnyQuestion, timeout_s: float = TIMEOUT_S) -> Any:
    """Return control's answer. Raises CommandFailed with its reason for giving none, LogError."""
    try:
        return await ask_leader(log, question, timeout_s=timeout_s)
    except QuestionRefused as refused:
        raise CommandFailed(str(refused)) from refused


def first_of(group: BaseExceptionGroup[Any]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)


def list_of(lines: Sequence[Mapping[str, Any]], *, as_json: bool, shown: Shown) -> None:
    """Print lines that all have the same names; as a table, `shown` says how a value is written, and a name
    goes without its unit."""
    if as_json:
        print(json.dumps(lines, ensure_ascii=False))
        return
    columns = [name.removesuffix("_nanousd") for name in lines[0]] if lines else ["nothing yet"]
    rows = [
        [shown[name](value) if name in shown else value for name, value in line.items()] for line in lines
    ]
    print(table(QueryResult(columns, rows)))


def money(nanousd: int | None) -> str | None:
    return None if nanousd is None else usd(nanousd)


def moment(at_ns: int | None) -> str | None:
    """A stored time for people, in UTC."""
    return None if at_ns is None else f"{datetime.fromtimestamp(at_ns // SECOND_NS, UTC):%Y-%m-%dT%H:%M:%SZ}"


def table(answer: QueryResult) -> str:
    """Columns under their names, numbers to the right."""
    rows = [["" if value is None else str(value) for value in row] for row in answer.rows]
    widths = [max(map(len, column)) for column in zip(answer.columns, *rows, strict=True)]
    numeric = [all(isinstance(row[at], int | float) for row in answer.rows) for at in range(len(widths))]
    lines = [answer.columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )
