"""The list of commands, and how a failure becomes a message and an exit status."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from events.errors import EventsError
from replay.errors import ReplayError
from rift import __version__
from rift.errors import RiftError, printable
from rift.logs.formats import LAST, LAST_PREFIX
from rift.logs.setup import is_json, set_up

# The modules of `rift/cli/` with their commands, in the order of `rift --help`. Only the module of the
# command that runs is imported, so a gateway loads neither DuckDB nor the worker.
COMMANDS = {
    "serve.up": ("up",),
    "serve.gateway": ("gateway",),
    "serve.worker": ("worker",),
    "serve.control": ("control",),
    "status.command": ("status",),
    "shards": ("shards",),
    "broker": ("broker",),
    "models": ("models",),
    "sql": ("sql", "ask"),
    "keys": ("accounts", "keys"),
    "limits": ("limits",),
    "credit": ("credit",),
    "invoices": ("invoice", "period", "correct"),
    "prices": ("prices", "rerate"),
    "log.replay": ("replay", "quarantine"),
    "log.archive": ("archive",),
    "log.audit": ("audit",),
    "log.spans": ("spans",),
    "log.backup": ("backup", "restore"),
    "calibrate": ("calibrate",),
    "backtest": ("backtest",),
}


# The exit status of a command that Ctrl-C ended, as shells have it.
INTERRUPTED = 130

# How much of a text that cannot be written is shown.
SHOWN = 80


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Raises SystemExit(2) for wrong usage."""
    exit_status = INTERRUPTED
    try:
        exit_status = _run(arguments)
    except* KeyboardInterrupt:
        print("rift: interrupted", file=sys.stderr)
    return exit_status


def _run(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser(arguments[0] if arguments else "").parse_args(arguments)
    # Whatever this process and its children write may hold a customer's data, so it is for its owner only.
    os.umask(0o077)
    # The roles change to the format that their settings name.
    set_up()
    exit_status = 0
    # From here on Ctrl-C is an exception, which lets the command end in order.
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        options.run(options)
    except* (EventsError, ReplayError, RiftError, OSError, UnicodeEncodeError) as failed:
        for error in _leaves(failed):
            if isinstance(error, BrokenPipeError):
                # The reader of the output, such as `head`, has all that it wants.
                exit_status = max(exit_status, 1)
                continue
            _fail(_text(error))
            exit_status = max(exit_status, error.exit_status if isinstance(error, RiftError) else 1)
    if (lost := _flush()) and not exit_status:
        print(f"rift: the output is not complete: {lost}", file=sys.stderr)
        exit_status = 1
    return exit_status


def _fail(message: str) -> None:
    """Show why this process ends. The supervisor shows it too."""
    if is_json():
        logging.getLogger(LAST).error("%s", message)
    else:
        print(LAST_PREFIX, printable(message, kept="\n"), sep="", file=sys.stderr)


def _text(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[:SHOWN]!r} cannot be written in {error.encoding}: {error.reason}"
    return str(error)


def _flush() -> str:
    """Write out what was printed, and return why that failed, or "". After a failure the rest is dropped: the
    interpreter would try again at its end and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # The reader of a closed pipe wants no more.
        return "" if isinstance(error, BrokenPipeError) else error.strerror or str(error)
    return ""


def build_parser(command: str = "") -> argparse.ArgumentParser:
    """Return the parser of one command, or of all if there is no such command."""
    parser = argparse.ArgumentParser(
        prog="rift", description="A self-hosted inference cloud built on one durable log."
    )
    parser.add_argument("--version", action="version", version=f"rift {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in [name for name, added in COMMANDS.items() if command in added] or COMMANDS:
        import_module(f"rift.cli.{module}").add_parser(commands)
    return parser


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
