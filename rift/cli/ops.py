"""Questions and entries: `rift sql`, `rift keys`."""

import json
import sys
from argparse import Namespace
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio

from events import book as books
from events.jetstream import JetStream
from events.log import LogError
from replay.answer import Answer, QueryRefused
from replay.warehouse import Warehouse, WarehouseError
from rift import accounts
from rift.cli.connection import connected, installation
from rift.control.questions import ask_sql

Result = TypeVar("Result")


class CommandFailed(Exception):
    """The command could not be done; the message says why."""


def sql(options: Namespace) -> None:
    """Ask the control process; where no broker answers, the database file itself."""
    try:
        try:
            answer = with_log(options, lambda log: ask_sql(log, options.select))
        except* LogError as nobody:
            answer = _from_file(options, nobody)
    except* (QueryRefused, WarehouseError) as refused:
        raise CommandFailed(_first(refused)) from refused
    if options.json:
        if twice := [name for name in answer.columns if answer.columns.count(name) > 1]:
            raise CommandFailed(f"two columns are called {twice[0]!r}; name them apart with `as`")
        rows = [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]
        print(json.dumps(rows, ensure_ascii=False))
    else:
        print(table(answer))


def _from_file(options: Namespace, nobody: BaseExceptionGroup[LogError]) -> Answer:
    found = installation(options)
    if options.nats or not found.database.exists():
        raise CommandFailed(_first(nobody))
    warehouse = Warehouse.open(found.database)
    try:
        return warehouse.query(options.select)
    finally:
        warehouse.close()


def create_key(options: Namespace) -> None:
    async def create(log: JetStream) -> Any:
        await accounts.open_account(log, await books.read(log), options.account)
        return await accounts.issue_key(log, options.account)

    key = with_log(options, create)
    if options.json:
        print(json.dumps({"account": options.account, "id": key.id, "key": key.text}))
        return
    print(key.text)
    print(f"key {key.id} of account {options.account}; it is not shown again", file=sys.stderr)


def with_log(options: Namespace, ask: Callable[[JetStream], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        async with connected(options, "cli") as log:
            return await ask(log)

    return anyio.run(run, backend_options={"use_uvloop": True})


def _first(group: BaseExceptionGroup[Any]) -> str:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)


def table(answer: Answer) -> str:
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
