"""What each command takes, and how a failure is shown."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from events.credit import NANOUSD_DIGITS
from events.log import LogError
from replay.warehouse import WarehouseError
from rift import __version__
from rift.accounts import AccountUnknown
from rift.broker import BrokerMissing
from rift.catalogue import CatalogueWrong
from rift.cli import limits, ops, roles
from rift.cli.ops import CommandFailed
from rift.engines import EngineFailed
from rift.engines.prepare import PrepareFailed
from rift.installation import InstallationWrong
from rift.settings import SettingsWrong

FAILURES = (
    AccountUnknown,
    BrokerMissing,
    CatalogueWrong,
    CommandFailed,
    EngineFailed,
    InstallationWrong,
    LogError,
    OSError,
    PrepareFailed,
    SettingsWrong,
    WarehouseError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    status = 0
    try:
        options.run(options)
    except* FAILURES as failed:
        for error in _leaves(failed):
            print(f"rift: {error}", file=sys.stderr)
        status = 1
    return status


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rift", description="An inference cloud whose truth is one log.")
    parser.add_argument("--version", action="version", version=f"rift {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    up = _command(commands, "up", roles.up, "run a whole installation on this machine")
    _engine_options(up)
    _listen_options(up)
    up.add_argument("--workers", type=int, choices=range(65), metavar="N", help="workers for the model (1)")

    gateway = _command(commands, "gateway", roles.gateway, "run a gateway")
    _engine_options(gateway)
    _listen_options(gateway)

    worker = _command(commands, "worker", roles.worker, "run a worker for one model")
    _engine_options(worker)
    worker.add_argument("--replica", help="name of this replica (a random one)")

    control = _command(commands, "control", roles.control, "run the projector and the ops questions")
    _engine_options(control)

    sql = _command(commands, "sql", ops.sql, "ask DuckDB about everything that happened")
    sql.add_argument("select", help="one SELECT; relations and columns are in replay/README.md")

    keys = commands.add_parser("keys", help="API keys").add_subparsers(metavar="ACTION", required=True)
    create = _command(keys, "create", ops.create_key, "create a key, and show it once")
    create.add_argument(
        "--account", required=True, type=_account, help="[a-z0-9-]{1,40}; opened if it is new"
    )
    _credit_commands(commands)
    return parser


def _credit_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    prepaid = commands.add_parser("credit", help="prepaid credit").add_subparsers(
        metavar="ACTION", required=True
    )
    grant = _command(prepaid, "grant", limits.grant, "add to an account's prepaid credit")
    grant.add_argument("--account", required=True, type=_account)
    grant.add_argument("--usd", required=True, type=_nanousd, metavar="USD", help="like 10.50")
    grant.add_argument("--reason", default="", metavar="TEXT", help="kept in the book")

    about = commands.add_parser("limits", help="plans and budgets").add_subparsers(
        metavar="ACTION", required=True
    )
    change = _command(about, "set", limits.change, "set an account's limits; what is not named stays")
    change.add_argument("--account", required=True, type=_account)
    change.add_argument("--budget", type=_budget, metavar="USD", help="of a calendar month (UTC), or none")
    change.add_argument("--plan", choices=["per_token", "per_second"])
    _command(about, "list", limits.show, "show every account's limits, and what is left")


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, run: object, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        default=Path(os.environ.get("RIFT_DATA") or ".rift"),
        help="folder of the installation (RIFT_DATA, else .rift)",
    )
    parser.add_argument(
        "--nats", metavar="URL", help="NATS server (RIFT_NATS_URL, else the installation's own)"
    )
    if name not in ("gateway", "worker", "control"):
        parser.add_argument("--json", action="store_true", help="one JSON value on standard output")
    return parser


def _engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings and models (DIR/rift.toml)")
    parser.add_argument("--model", metavar="NAME", help="model to serve (smollm2:135m)")
    parser.add_argument("--engine", choices=["vllm", "sim"], help="real or simulated (vllm)")


def _listen_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (8000)")


def _account(text: str) -> str:
    if not re.fullmatch("[a-z0-9-]{1,40}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no account name; use a-z, 0-9 and -, at most 40")
    return text


def _nanousd(text: str) -> int:
    """Return nano-USD, exactly: the digits are the answer."""
    if not (digits := re.fullmatch(r"([0-9]{1,9})(?:\.([0-9]{1,9}))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of USD; write it like 10.50")
    return int(digits[1] + (digits[2] or "").ljust(NANOUSD_DIGITS, "0"))


def _budget(text: str) -> int | str:
    return text if text == "none" else _nanousd(text)
