"""SQL questions and unreadable records: `rift sql`, `rift quarantine`."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from events.jetstream import JetStream
from events.log import LogError
from replay.warehouse.result import QueryResult
from rift import book_admin
from rift.cli import signals
from rift.cli.arguments import Commands, add_command
from rift.cli.connection import installation, with_log
from rift.cli.output import CommandFailed, first_message, print_result
from rift.control.projection.time_travel import parse as parse_position
from rift.control.sql.frames import SqlSetup
from rift.control.sql.host import ask_once
from rift.rpc import QuestionRefused, Sql, answer_of, ask_leader


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    query = add_command(commands, "sql", sql, "query everything that happened with DuckDB's SQL")
    query.add_argument("select", help="one SELECT; replay/README.md lists the relations and columns")

    skip = add_command(
        commands,
        "quarantine",
        quarantine,
        "make every reader skip a record that cannot be decoded",
        has_json=False,
    )
    skip.add_argument(
        "position", metavar="STREAM:SEQUENCE", help="position as in relation `lag`, like RIFT_0:812"
    )
    skip.add_argument("--reason", required=True, help="why; stored permanently in the book")


def sql(options: Namespace) -> None:
    """Ask the control process, or the database file itself if no broker answers."""
    try:
        try:
            result = QueryResult(**with_log(options, lambda log: ask_leader(log, Sql(options.select))))
        except* LogError as silent:
            result = _query_file(options, silent)
    except* QuestionRefused as refused:
        raise CommandFailed(first_message(refused)) from refused
    print_result(result, as_json=options.json)


def _query_file(options: Namespace, silent: BaseExceptionGroup[LogError]) -> QueryResult:
    folder = installation(options)
    database = folder.database
    # Under `rift up` control is starting again: it will answer, and has the file open.
    if options.nats or folder.is_locked() or not database.exists():
        raise CommandFailed(first_message(silent))

    async def ask() -> QueryResult:
        return await ask_file(database, options.select)

    return signals.run(ask)


async def ask_file(database: Path, select: str) -> QueryResult:
    """Answer a question from a database file that no process has open, within the bounds of control's SQL
    process. Raises QuestionRefused."""
    reply = await ask_once(SqlSetup(str(database)), select)
    return QueryResult(**answer_of(Sql.topic, reply))


def quarantine(options: Namespace) -> None:
    position = parse_position(options.position)

    async def add(log: JetStream) -> None:
        await book_admin.quarantine(log, position.stream, position.sequence, options.reason)

    with_log(options, add)
    print(f"readers skip {position.stream}:{position.sequence} from now on")
