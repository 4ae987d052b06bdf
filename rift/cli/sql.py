"""Questions to the log: `rift sql` in SQL, and `rift ask` by name."""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

import msgspec

from events.log import LogError
from replay import questions
from replay.warehouse.result import QueryResult
from rift import clock
from rift.cli import signals
from rift.cli.arguments import Commands, add_command
from rift.cli.connection import installation, with_log
from rift.cli.output import CommandFailed, first_message, print_answer, print_list, print_result
from rift.control.sql.frames import SqlSetup
from rift.control.sql.host import ask_once
from rift.rpc import QuestionRefused, Sql, answer_of, ask_leader


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    query = add_command(commands, "sql", sql, "query everything that happened with DuckDB's SQL")
    query.add_argument("select", help="one SELECT; replay/README.md lists the relations and columns")

    named = add_command(
        commands,
        "ask",
        ask,
        "ask a named question, such as which requests were slowest and why control scaled",
    )
    named.add_argument("question", nargs="?", metavar="QUESTION", help="name of the question")
    named.add_argument("parameters", nargs="*", metavar="NAME=VALUE", help="parameters, like since=24h")
    named.add_argument("--list", action="store_true", help="list the questions and their parameters")


def sql(options: Namespace) -> None:
    print_result(_answer(options, options.select), as_json=options.json)


def ask(options: Namespace) -> None:
    """Ask a question of `replay/sql/ask/`, or list the questions."""
    if options.list or options.question is None:
        _list_questions(as_json=options.json)
        return
    question = questions.named(options.question)
    given: dict[str, str] = {}
    for text in options.parameters:
        name, equals, value = text.partition("=")
        if not equals:
            raise CommandFailed(f"a parameter must be NAME=VALUE, like since=24h, got {text!r}")
        if name in given:
            raise CommandFailed(f"parameter {name} is given twice; give one value")
        given[name] = value
    print_answer(_answer(options, question.select(given, clock.now_ns())), as_json=options.json)


def _list_questions(*, as_json: bool) -> None:
    known = questions.questions()
    if as_json:
        print_list([msgspec.to_builtins(question) for question in known], as_json=True, formats={})
        return
    for question in known:
        print(" ".join([question.name, *(parameter.usage for parameter in question.parameters)]))
        print(f"    {question.shows}")
        for parameter in question.parameters:
            print(f"    {parameter.name}: {parameter.meaning}")


def _answer(options: Namespace, select: str) -> QueryResult:
    """Ask the control process, or the database file itself if no broker answers."""
    try:
        try:
            return QueryResult(**with_log(options, lambda log: ask_leader(log, Sql(select))))
        except* LogError as silent:
            result = _query_file(options, select, silent)
    except* QuestionRefused as refused:
        raise CommandFailed(first_message(refused)) from refused
    return result


def _query_file(options: Namespace, select: str, silent: BaseExceptionGroup[LogError]) -> QueryResult:
    folder = installation(options)
    database = folder.database
    # Under `rift up` control is starting again: it will answer, and has the file open. With a broker of one's
    # own it may be elsewhere or without a log, so the file would be in use, or old without a word.
    if options.nats or os.environ.get("RIFT_NATS_URL") or folder.is_locked() or not database.exists():
        raise CommandFailed(first_message(silent))

    async def ask_folder() -> QueryResult:
        return await ask_file(database, select)

    return signals.run(ask_folder)


async def ask_file(database: Path, select: str) -> QueryResult:
    """Answer a question from a database file that no process has open, within the bounds of control's SQL
    process. Raises QuestionRefused."""
    reply = await ask_once(SqlSetup(str(database)), select)
    return QueryResult(**answer_of(Sql.topic, reply))
