"""How a command registers itself, and the options that several commands share."""

import argparse
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from replay.billing.invoice import PERIOD

Commands = argparse._SubParsersAction


def add_command(
    commands: "Commands[ArgumentParser]",
    name: str,
    run: Callable[[Namespace], None],
    text: str,
    *,
    has_json: bool = True,
) -> ArgumentParser:
    """Add a command and the options that every command has. `text` is a verb phrase.

    `has_json` is False for commands that print one line, or something with a format of its own.
    """
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        default=Path(os.environ.get("RIFT_DATA") or ".rift"),
        help="installation folder (default: RIFT_DATA, else .rift)",
    )
    parser.add_argument(
        "--nats", metavar="URL", help="NATS server (default: RIFT_NATS_URL, else the installation's own)"
    )
    if has_json:
        parser.add_argument("--json", action="store_true", help="print one JSON value to standard output")
    return parser


def add_group(commands: "Commands[ArgumentParser]", name: str, text: str) -> "Commands[ArgumentParser]":
    """Add a command that has actions, like `rift keys list`."""
    return commands.add_parser(name, help=text).add_subparsers(metavar="ACTION", required=True)


# --- shared options ----------------------------------------------------------------------------------------


def add_config(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings and models (default: DIR/rift.toml)"
    )


def add_engine(parser: ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--model", metavar="NAME", help="model to serve (default: smollm2:135m)")
    parser.add_argument("--engine", choices=["vllm", "sim"], help="real or simulated engine (default: vllm)")


def add_workers(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--workers", metavar="N|MIN..MAX", help="number of workers for the model (default: 1)"
    )


def add_listen(parser: ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000)")


def add_metrics(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--metrics",
        metavar="HOST[:PORT]",
        help="address of /metrics; empty for none (default: 127.0.0.1, at the role's own port)",
    )


def add_account(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--account", required=True, type=account, metavar="NAME", help="account that the command is about"
    )


def add_period(parser: ArgumentParser) -> None:
    parser.add_argument("--period", required=True, type=period, metavar="YYYY-MM", help="calendar month, UTC")


def add_entry_id(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--id",
        type=entry_id,
        metavar="TEXT",
        help="idempotency id; repeating the command with the same id has no further effect (default: random)",
    )


# --- types of values ---------------------------------------------------------------------------------------


def positive(text: str) -> int:
    if not re.fullmatch("[0-9]{1,16}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    if not re.fullmatch("[0-9]{1,16}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 0, got {text!r}")
    return int(text)


def period(text: str) -> str:
    if not PERIOD.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be a month as YYYY-MM, like 2026-11, got {text!r}")
    return text


def account(text: str) -> str:
    return _name(text, "account name")


def entry_id(text: str) -> str:
    return _name(text, "id")


def _name(text: str, what: str) -> str:
    if not re.fullmatch("[a-z0-9-]{1,40}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a valid {what}; use 1 to 40 characters of a-z, 0-9 and -"
        )
    return text
