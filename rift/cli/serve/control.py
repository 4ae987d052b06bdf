"""`rift control`: one control process. The elected leader projects, scales, archives and bills."""

import os
import secrets
from argparse import ArgumentParser, Namespace
from pathlib import Path

import anyio

from rift.broker import roles
from rift.cli import signals
from rift.cli.arguments import Commands, add_command, add_engine, add_metrics, add_workers
from rift.cli.connection import connected_role, installation, load_settings, sql_setup
from rift.cli.log.fresh_warehouse import archive
from rift.control import process
from rift.control.config import ControlConfig
from rift.control.scaling_config import model_scaling
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
        async with connected_role(
            options, settings, "control", roles.CONTROL, archive=kept, database=database
        ) as log:
            config = ControlConfig(
                sql=sql_setup(options, database),
                retention_days=settings.retention_days,
                scaling=model_scaling(settings),
                driver=_driver(settings),
            )
            await process.run(log, database, kept, config, stop=stop)

    signals.run_until_stopped(serve)


def _driver(settings: Settings) -> Driver | None:
    """Return what the leader scales replicas with, or None if another process starts them.

    Raises ClusterError.
    """
    if settings.fleet != "kubernetes":
        return None
    return KubernetesFleet(Cluster.around(os.environ), jitter=secrets.SystemRandom().random)
