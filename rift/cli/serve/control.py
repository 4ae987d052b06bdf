"""`rift control`: one control process. The elected leader projects, scales, archives and bills."""

import os
import secrets
from argparse import ArgumentParser, Namespace
from pathlib import Path

import anyio

from rift.cli import signals
from rift.cli.arguments import Commands, add_command, add_engine, add_metrics, add_workers
from rift.cli.connection import connected_role, installation, load_settings
from rift.cli.log.fresh_warehouse import archive
from rift.control import process
from rift.control.config import ControlConfig
from rift.control.scaling_config import model_scaling
from rift.control.sql.frames import SqlSetup
from rift.fleet import Driver
from rift.fleet.cluster import Cluster
from rift.fleet.kubernetes import KubernetesFleet
from rift.settings import Settings


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    parser = add_command(
        commands, "control", control, "run one control process; the processes elect a leader", has_json=False
    )
    add_engine(parser)
    parser.add_argument(
        "--database",
        type=Path,
        metavar="FILE",
        help="DuckDB file of this process; two processes must not share one (default: DIR/rift.duckdb)",
    )
    add_workers(parser)
    add_metrics(parser)


def control(options: Namespace) -> None:
    settings = load_settings(options)
    database = options.database or installation(options).database
    kept = archive(options, keep_content=settings.archive_content)

    async def serve(stop: anyio.Event) -> None:
        async with connected_role(options, settings, "control", archive=kept, database=database) as log:
            config = ControlConfig(
                sql=_sql(options, database),
                retention_days=settings.retention_days,
                scaling=model_scaling(settings),
                driver=_driver(settings),
            )
            await process.run(log, database, kept, config, stop=stop)

    signals.run_until_stopped(serve)


def _sql(options: Namespace, database: Path) -> SqlSetup:
    """Return what the process that answers SQL needs. Its file is beside this process's."""
    folder = installation(options)
    address = folder.log_address(options.nats, os.environ)
    return SqlSetup(
        database=str(database.with_stem(f"{database.stem}-sql").absolute()),
        url=address.url,
        token=address.token,
        archive=str(folder.archive),
        archive_key=folder.archive_key(),
    )


def _driver(settings: Settings) -> Driver | None:
    """Return what the leader scales replicas with, or None if another process starts them.

    Raises ClusterError.
    """
    if settings.fleet != "kubernetes":
        return None
    return KubernetesFleet(Cluster.around(os.environ), jitter=secrets.SystemRandom().random)
