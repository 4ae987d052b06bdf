"""How a command finds its installation, its settings, the log and the control process."""

import os
from argparse import Namespace
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio

from events.jetstream import AccessRefused, BrokerCheck, JetStream, connect
from events.log import LogError, NoResponders
from replay.archive.folder import ArchiveFolder
from replay.sql_files import substituted
from rift import settings
from rift.broker.roles import MAKES_STREAMS, OPERATOR
from rift.cli.output import CommandFailed
from rift.control.projection import continuity
from rift.control.projection.continuity import WrongLog
from rift.data_dir import DataDir
from rift.logs.setup import set_up
from rift.rpc import AnyQuestion, QuestionRefused, Sql, ask_leader
from rift.settings import Settings
from rift.startup import once_answered, prepared

OVERRIDES = ("host", "port", "model", "engine", "workers", "metrics")

Result = TypeVar("Result")


def installation(options: Namespace) -> DataDir:
    """Return the installation the command is about. Raises DataDirError if its folder has another version."""
    folder = DataDir(options.data)
    folder.check()
    return folder


def settings_file(options: Namespace) -> Path | None:
    """Return the settings file: the one in `--config`, else `DIR/rift.toml` if there is one, even if its
    link leads nowhere.

    Raises DataDirError.
    """
    default = installation(options).folder / "rift.toml"
    named: Path | None = options.config
    return named or (default if os.path.lexists(default) else None)


def load_settings(options: Namespace) -> Settings:
    """Return the settings, overridden by the options. Raises InvalidSettings, DataDirError."""
    given = {name: getattr(options, name, None) for name in OVERRIDES}
    return settings.load(
        settings_file(options), {name: value for name, value in given.items() if value is not None}
    )


def role_settings(options: Namespace) -> Settings:
    """As `load_settings`, for a process that serves: from here on, log in the format that they name."""
    loaded = load_settings(options)
    set_up(loaded.log_format)
    return loaded


@asynccontextmanager
async def connected(options: Namespace, name: str, role: str) -> AsyncIterator[JetStream]:
    """Connect to the log under a name, with the rights of a role. Raises LogError, DataDirError."""
    address = installation(options).log_address(options.nats, os.environ)
    try:
        log = await connect(address.url, address.access(role), name=name)
    except AccessRefused as error:
        raise LogError(
            f"{error}; RIFT_NATS_CREDENTIALS and RIFT_NATS_TLS name the folders of its password and of ca.pem"
        ) from error
    except LogError as error:
        raise LogError(f"{error}; if Rift is not running, start it with `rift up`") from error
    try:
        yield log
    finally:
        await log.close()


@asynccontextmanager
async def connected_role(
    options: Namespace,
    settings: Settings,
    name: str,
    role: str,
    *,
    archive: ArchiveFolder | None = None,
    database: Path | None = None,
) -> AsyncIterator[JetStream]:
    """As `connected`, for a process that writes: check the broker and prepare its streams first.

    With an archive, also check that the log continues it and the database. Wait for a cluster that elects.
    Raises CommandFailed, and LogError also later, out of the context, if the broker comes back with other
    settings.
    """
    address = installation(options).log_address(options.nats, os.environ)
    async with connected(options, name, role) as log:

        async def prepare() -> BrokerCheck:
            if archive is not None:
                await _check_log(log, archive, database, installation(options))
            return await prepared(log, settings, address.monitor, changes=role in MAKES_STREAMS)

        check = await once_answered(prepare)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(check.watch)
            yield log
            tasks.cancel_scope.cancel()


async def _check_log(log: JetStream, archive: ArchiveFolder, database: Path | None, folder: DataDir) -> None:
    try:
        await continuity.check(log, archive, database, secret=folder.secret())
    except WrongLog as error:
        raise CommandFailed(
            f"the log at {log.server_address} is not the log of {folder.folder}: {error}; name its broker "
            "with --nats, or another folder with --data, or restore the broker's data and the folder together"
        ) from error


def with_log(options: Namespace, ask: Callable[[JetStream], Awaitable[Result]]) -> Result:
    """Connect to the log, and return what `ask` returns."""

    async def run() -> Result:
        async with connected(options, "cli", OPERATOR) as log:
            return await ask(log)

    return anyio.run(run, backend_options={"use_uvloop": True})


async def ask_control(log: JetStream, question: AnyQuestion, timeout_s: float | None = None) -> Any:
    """Return control's answer. Raises CommandFailed with the reason if control refuses, LogError."""
    try:
        return await ask_leader(log, question, timeout_s=timeout_s)
    except NoResponders as error:
        raise CommandFailed(
            f"{error}: control does not run or is still starting; `rift status` and its log tell more"
        ) from error
    except QuestionRefused as refused:
        raise CommandFailed(str(refused)) from refused


def select(name: str, **values: str | int | None) -> Sql:
    """Return the question in `replay/sql/cli/NAME.sql`, with literals in place of its `$parameters`."""
    return Sql(substituted(f"cli/{name}", values))
