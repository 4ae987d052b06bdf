"""How a command finds its installation and its log."""

import os
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from events.jetstream import JetStream, connect
from events.log import LogError
from rift import settings
from rift.data_dir import DataDir
from rift.settings import SHARDS, Settings

OVERRIDES = ("host", "port", "model", "engine", "workers")


def installation(options: Namespace) -> DataDir:
    """Return what the command is about. Raises DataDirError for a folder of another version."""
    found = DataDir(options.data)
    found.check()
    return found


def configuration(options: Namespace) -> Path | None:
    """Return the settings file: the one named, or `DIR/rift.toml` if there is one.

    Raises DataDirError.
    """
    default = installation(options).folder / "rift.toml"
    named: Path | None = options.config
    return named or (default if default.exists() else None)


def load_settings(options: Namespace) -> Settings:
    """Raises InvalidSettings, DataDirError."""
    given = {name: getattr(options, name, None) for name in OVERRIDES}
    return settings.load(
        configuration(options), {name: value for name, value in given.items() if value is not None}
    )


@asynccontextmanager
async def connected(options: Namespace, name: str) -> AsyncIterator[JetStream]:
    """Raises LogError, DataDirError."""
    address = installation(options).log_address(options.nats, os.environ)
    try:
        log = await connect(address.url, token=address.token, name=name)
    except LogError as error:
        raise LogError(f"{error}; if Rift does not run, `rift up` starts it") from error
    try:
        yield log
    finally:
        await log.close()


@asynccontextmanager
async def connected_role(options: Namespace, settings: Settings, name: str) -> AsyncIterator[JetStream]:
    """As `connected`, for a process that writes: the broker must be as the protocol needs it."""
    async with connected(options, name) as log:
        await log.ensure_streams(
            shards=SHARDS,
            replicas=settings.replicas,
            max_bytes=settings.log_bytes_max,
            retention_days=settings.retention_days,
        )
        yield log
