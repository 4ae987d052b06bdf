"""What each command takes, and how a failure is shown."""

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from events.log import LogError
from events.money import InvalidMoney
from replay.archive.manifest import ArchiveError
from replay.audit_export import AuditError
from replay.backtest.traces import FORMATS
from replay.billing.invoice import PERIOD, BillingRefused
from replay.warehouse.warehouse import ProjectionStopped, WarehouseError
from rift import __version__
from rift.book_admin import AccountUnknown, KeyUnknown, OutcomeOpen, RecordReadable
from rift.catalogue import InvalidCatalogue
from rift.cli import (
    accounts,
    backtest,
    calibrate,
    credit,
    keys,
    limits,
    models,
    money,
    output,
    replay,
    serve,
    status,
)
from rift.cli.output import CommandFailed
from rift.control.projection.projector import LogBehind, LogTrimmed
from rift.control.projection.time_travel import InvalidPosition
from rift.data_dir import DataDirError
from rift.engines import EngineFailed
from rift.engines.prepare import PrepareFailed
from rift.fleet.cluster import ClusterError
from rift.nats_server import BrokerMissing
from rift.prices import InvalidPrices
from rift.settings import InvalidSettings

# They say one line, or print what has a form of its own.
WITHOUT_JSON = ("gateway", "worker", "control", "verify", "export", "publish", "quarantine")

FAILURES = (
    AccountUnknown,
    ArchiveError,
    AuditError,
    BillingRefused,
    BrokerMissing,
    InvalidCatalogue,
    ClusterError,
    CommandFailed,
    EngineFailed,
    DataDirError,
    KeyUnknown,
    LogBehind,
    LogError,
    LogTrimmed,
    InvalidMoney,
    OSError,
    OutcomeOpen,
    InvalidPosition,
    PrepareFailed,
    InvalidPrices,
    ProjectionStopped,
    RecordReadable,
    InvalidSettings,
    WarehouseError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    # Each request would be a line.
    logging.getLogger("httpx").setLevel(logging.WARNING)
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

    up = _command(commands, "up", serve.up, "run a whole installation on this machine")
    _engine_options(up)
    _listen_options(up)
    _workers_option(up)

    gateway = _command(commands, "gateway", serve.gateway, "run a gateway")
    _engine_options(gateway)
    _listen_options(gateway)
    _workers_option(gateway)

    worker = _command(commands, "worker", serve.worker, "run a worker for one model")
    _engine_options(worker)
    worker.add_argument("--replica", help="name of this replica (a random one)")
    worker.add_argument("--pod", help="name of the pod that it runs in: each start is another replica of it")

    control = _command(commands, "control", serve.control, "run a control process: one leads")
    _engine_options(control)
    control.add_argument(
        "--database", type=Path, metavar="FILE", help="its DuckDB file: each has its own (DIR/rift.duckdb)"
    )
    _workers_option(control)

    _command(commands, "status", status.status, "show what runs, waits and lags; 1 if something is amiss")
    _models(commands)

    sql = _command(commands, "sql", output.sql, "ask DuckDB about everything that happened")
    sql.add_argument("select", help="one SELECT; relations and columns are in replay/README.md")

    _accounts(commands)
    _money(commands)
    _replay(commands)
    _calibrate(commands)
    _backtest(commands)
    return parser


def _models(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = commands.add_parser("models", help="the catalogue").add_subparsers(
        metavar="ACTION", required=True
    )
    listed = _command(about, "list", models.list_models, "show every model that is known, and who serves it")
    add = _command(about, "add", models.add, "add a model to rift.toml")
    for parser in (listed, add):
        parser.add_argument("--config", type=Path, metavar="FILE", help="settings and models (DIR/rift.toml)")
    add.add_argument("name", metavar="NAME", help="as clients will ask for it")
    add.add_argument("--source", required=True, metavar="WHERE", help="a path, or a model hub's id")
    add.add_argument("--context-tokens", required=True, type=_positive, metavar="N")
    add.add_argument("--prompt-usd", required=True, metavar="USD", help='per million tokens, like "0.15"')
    add.add_argument("--output-usd", required=True, metavar="USD", help="per million tokens")
    add.add_argument("--title", default="", metavar="TEXT", help="for people")
    add.add_argument(
        "--profile",
        action="append",
        nargs="+",
        default=[],
        metavar=("HARDWARE", "NAME=VALUE"),
        help="how a hardware serves it: gpus=8 gpu_hour_usd=1.99, and engine arguments; may be repeated",
    )


def _calibrate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    fit = _command(commands, "calibrate", calibrate.run, "fit a hardware profile to a replica that runs")
    fit.add_argument("--config", type=Path, metavar="FILE", help="settings and models (DIR/rift.toml)")
    fit.add_argument("--model", required=True, metavar="NAME", help="it must have one replica, and no users")
    fit.add_argument("--url", help="the gateway (that of rift.toml)")
    fit.add_argument("--key", help="API key (the installation's first)")
    fit.add_argument("--seconds", type=_positive, default=60, metavar="S", help="about how long (60)")
    fit.add_argument("--concurrency-max", type=_positive, metavar="N", help="streams at once (its slots)")
    fit.add_argument("--kv-tokens", type=_positive, metavar="N", help="what its KV cache holds")
    fit.add_argument("--gpu-hour-usd", metavar="USD", help="what one GPU costs an hour")


def _accounts(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Accounts, keys, limits and credit: each is listed, and changed, in one shape."""
    known = commands.add_parser("accounts", help="accounts").add_subparsers(metavar="ACTION", required=True)
    _command(known, "list", accounts.show, "show every account")

    of_keys = commands.add_parser("keys", help="API keys").add_subparsers(metavar="ACTION", required=True)
    create = _command(of_keys, "create", keys.create, "create a key, and show it once")
    create.add_argument(
        "--account", required=True, type=_account, help="[a-z0-9-]{1,40}; opened if it is new"
    )
    create.add_argument(
        "--scopes",
        default="inference,usage",
        metavar="A,B",
        help="of inference, usage, admin (the first two)",
    )
    create.add_argument("--models", metavar="A,B", help="what it may use (all)")
    create.add_argument("--expires", metavar="WHEN", help="30d, 12h, or a day (its beginning, UTC) (never)")
    listed = _command(of_keys, "list", keys.show, "show every key; never its text")
    listed.add_argument("--account", type=_account, metavar="NAME", help="its keys alone")
    revoke = _command(of_keys, "revoke", keys.revoke, "refuse a key from now on, and end what runs under it")
    revoke.add_argument("key", metavar="ID", help="the part between its underscores")

    about = commands.add_parser("limits", help="limits, plans and budgets").add_subparsers(
        metavar="ACTION", required=True
    )
    change = _command(
        about, "set", limits.change, "set limits of an account or a key; what is not named stays"
    )
    _account_option(change)
    change.add_argument("--key", metavar="ID", help="of this key alone, within the account's")
    for name, what in (
        ("requests-per-minute", "accepted in any 60 s"),
        ("tokens-per-minute", "of prompt and output, in any 60 s"),
        ("concurrent", "requests under way at once"),
    ):
        change.add_argument(f"--{name}", metavar="N", help=f"{what}, or none")
    change.add_argument("--queue-share", metavar="PERCENT", help="of a model's queue, or none (33)")
    change.add_argument("--budget", metavar="USD", help="at most so much a calendar month (UTC), or none")
    change.add_argument("--plan", choices=["per_token", "per_second"])
    _command(about, "list", limits.show, "show every account's limits, and its keys'")

    prepaid = commands.add_parser("credit", help="prepaid credit").add_subparsers(
        metavar="ACTION", required=True
    )
    grant = _command(prepaid, "grant", credit.grant, "add to an account's prepaid credit")
    _account_option(grant)
    grant.add_argument("--usd", required=True, metavar="AMOUNT", help="like 10.50")
    grant.add_argument("--reason", default="", metavar="TEXT", help="kept in the book")
    _id_option(grant)
    _command(prepaid, "list", credit.show, "show what every account has, holds and has spent")


def _money(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    invoice = _command(commands, "invoice", money.invoice, "show an account's invoice of a month")
    _account_option(invoice)
    _period_option(invoice)
    invoice.add_argument("--csv", action="store_true", help="lines as FOCUS 1.2, for finance's tools")

    prices = commands.add_parser("prices", help="price lists").add_subparsers(metavar="ACTION", required=True)
    _command(prices, "list", money.list_prices, "show the prices in force")
    publish = _command(prices, "publish", money.publish_prices, "put a price list in force")
    publish.add_argument("--config", type=Path, metavar="FILE", help="settings and models (DIR/rift.toml)")
    publish.add_argument(
        "file", type=Path, metavar="FILE", help='TOML: [prices."MODEL"] prompt_usd = "0.15" …'
    )

    period = commands.add_parser("period", help="months").add_subparsers(metavar="ACTION", required=True)
    close = _command(period, "close", money.close_period, "make a month's invoices final")
    close.add_argument("period", type=_period, metavar="YYYY-MM")

    correct = _command(
        commands, "correct", money.correct, "add to an account's next invoice, or take from it"
    )
    _account_option(correct)
    correct.add_argument("--usd", required=True, metavar="AMOUNT", help="negative in the account's favour")
    correct.add_argument("--reason", required=True, help="in words; it is on the record for ever")
    correct.add_argument("--request", metavar="ID", help="what is corrected")
    correct.add_argument("--model", metavar="NAME", help="whose line it is on (the request's)")
    _id_option(correct)

    rerate = _command(commands, "rerate", money.rerate, "show what another price list would have charged")
    rerate.add_argument("--price-list", type=Path, required=True, metavar="FILE")
    _period_option(rerate)
    rerate.add_argument("--diff", action="store_true", required=True, help="only show: nothing is changed")


def _replay(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    again = _command(commands, "replay", replay.replay, "fold the log again, and compare")
    how = again.add_mutually_exclusive_group(required=True)
    how.add_argument("--rebuild", action="store_true", help="into a fresh file, then go on with that")
    how.add_argument("--until", metavar="POSITION", help="answer SELECT as of a position, like RIFT_0:812.0")
    how.add_argument("--verify", action="store_true", help="list what does not come out again; status 1")
    how.add_argument("--digest", action="store_true", help="SHA-256 of each relation that a bill rests on")
    again.add_argument("select", nargs="?", help="with --until: one SELECT (how far the streams are folded)")

    quarantine = _command(
        commands, "quarantine", output.quarantine, "have all readers pass over a record that none can read"
    )
    quarantine.add_argument(
        "position", metavar="STREAM:SEQUENCE", help="as relation `lag` says, like RIFT_0:812"
    )
    quarantine.add_argument("--reason", required=True, help="in words; it is on the record for ever")

    archive = commands.add_parser("archive", help="the archive").add_subparsers(
        metavar="ACTION", required=True
    )
    _command(archive, "verify", replay.verify_archive, "check every hash of the archive")

    audit = commands.add_parser("audit", help="proofs").add_subparsers(metavar="ACTION", required=True)
    export = _command(audit, "export", replay.export, "write an account's facts of a month, with proofs")
    _account_option(export)
    _period_option(export)
    export.add_argument("folder", type=Path, metavar="DIR", help="a new folder, for replay/auditor.py")


def _backtest(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    test = _command(commands, "backtest", backtest.backtest, "try a scaling policy on a trace, and price it")
    test.add_argument("--trace", type=Path, metavar="PATH", help="a file; without one, Rift's own log")
    test.add_argument("--trace-format", choices=FORMATS, help="what it is (by its name, else log)")
    test.add_argument("--profile", required=True, metavar="NAME", help="of replay/scaling/hardware.toml")
    test.add_argument("--policy", default="default", metavar="P", help=backtest.POLICIES)
    test.add_argument("--start-s", type=float, metavar="S", help="how long a start takes (the profile's)")
    test.add_argument("--ttft-ms", type=int, default=backtest.TTFT_MS, metavar="MS", help="target (2000)")
    test.add_argument("--thin", type=int, default=1, metavar="N", help="keep an N-th part of the clients (1)")
    test.add_argument("--model", metavar="NAME", help="with the log: whose requests")
    test.add_argument("--plot", type=Path, metavar="FILE.png", help="draw demand, replicas, missed targets")


def _account_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--account", required=True, type=_account, metavar="NAME")


def _id_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--id", type=_entry, metavar="TEXT", help="said again with the same, it counts once (a new one)"
    )


def _period_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--period", required=True, type=_period, metavar="YYYY-MM", help="a month, in UTC")


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
    if name not in WITHOUT_JSON:
        parser.add_argument("--json", action="store_true", help="one JSON value on standard output")
    return parser


def _engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings and models (DIR/rift.toml)")
    parser.add_argument("--model", metavar="NAME", help="model to serve (smollm2:135m)")
    parser.add_argument("--engine", choices=["vllm", "sim"], help="real or simulated (vllm)")


def _workers_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", metavar="N|MIN..MAX", help="workers for the model (1)")


def _listen_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (8000)")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _period(text: str) -> str:
    if not PERIOD.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no period; write a month as YYYY-MM, like 2026-11")
    return text


def _account(text: str) -> str:
    return _name(text, "account name")


def _entry(text: str) -> str:
    return _name(text, "id")


def _name(text: str, what: str) -> str:
    if not re.fullmatch("[a-z0-9-]{1,40}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no {what}; use a-z, 0-9 and -, at most 40")
    return text
