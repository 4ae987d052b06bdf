"""`rift replay`: fold the log again, or answer from its past. `rift quarantine`: skip a record."""

from argparse import ArgumentParser, Namespace

from anyio import to_thread

from events.jetstream import JetStream
from replay.warehouse.result import QueryResult
from replay.warehouse.warehouse import Warehouse
from rift import book_admin
from rift.cli.arguments import Commands, add_command
from rift.cli.connection import ask_control, with_log
from rift.cli.log import verify
from rift.cli.log.fresh_warehouse import archive, temporary_file
from rift.cli.output import CommandFailed, first_message, positions, print_result
from rift.cli.sql import ask_file
from rift.control.projection.time_travel import fold_until, parse
from rift.rpc import LONG_TIMEOUT_S, Digests, QuestionRefused, Rebuild


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    parser = add_command(
        commands, "replay", replay, "fold the whole log again: rebuild, compare or look back"
    )
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--rebuild", action="store_true", help="have control rebuild its database and switch to the new file"
    )
    mode.add_argument(
        "--until", metavar="POSITION", help="answer SELECT as of an earlier position, like RIFT_0:812.0"
    )
    mode.add_argument(
        "--verify",
        action="store_true",
        help="compare a fresh replay with the database in use; exit status 1 if they differ",
    )
    mode.add_argument(
        "--digest", action="store_true", help="print the SHA-256 of each relation that bills depend on"
    )
    parser.add_argument(
        "select",
        nargs="?",
        help="with --until: one SELECT (default: how far each stream is folded)",
    )

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


def replay(options: Namespace) -> None:
    if options.select and options.until is None:
        raise CommandFailed("a SELECT needs --until POSITION; use `rift sql` to query the present")
    if options.rebuild:
        rebuild(options)
    elif options.until is not None:
        until(options)
    elif options.verify:
        verify.verify(options)
    else:
        digest(options)


def rebuild(options: Namespace) -> None:
    applied = with_log(options, lambda log: ask_control(log, Rebuild(), LONG_TIMEOUT_S))
    print(f"rebuilt up to {positions(applied)}")


def digest(options: Namespace) -> None:
    in_use = with_log(options, lambda log: ask_control(log, Digests(), LONG_TIMEOUT_S))
    for relation, sha256 in in_use["digests"].items():
        print(f"{sha256}  {relation}")


def until(options: Namespace) -> None:
    """Answer a SELECT as of a position."""
    position = parse(options.until)
    source = archive(options)

    async def ask(log: JetStream) -> QueryResult:
        with temporary_file() as path:
            warehouse = await to_thread.run_sync(Warehouse.open, path)
            try:
                await fold_until(log, source, warehouse, position)
            finally:
                await to_thread.run_sync(warehouse.close)
            return await ask_file(path, options.select or "from lag")

    try:
        print_result(with_log(options, ask), as_json=options.json)
    except* QuestionRefused as refused:
        raise CommandFailed(first_message(refused)) from refused


def quarantine(options: Namespace) -> None:
    position = parse(options.position)

    async def add(log: JetStream) -> None:
        await book_admin.quarantine(log, position.stream, position.sequence, options.reason)

    with_log(options, add)
    print(f"readers skip {position.stream}:{position.sequence} from now on")
