"""`rift control`: one control process. The elected leader projects, scales, archives and bills."""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

import anyio

from rift.broker import roles
from rift.cli import signals
from rift.cli.arguments import Commands, add_command, add_engine, add_metrics, add_workers
from rift.cli.connection import connected_role, installation, role_settings
from rift.cli.log.fresh_warehouse import archive
from rift.cli.serve.control_parts import driver, sql_setup
from rift.control import process
from rift.control.config import ControlConfig
from rift.control.scaling_config import model_scaling


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
    settings = role_settings(options)
    database = options.database or installation(options).database
    kept = archive(options, keep_content=settings.archive_content)

    async def serve(stop: anyio.Event) -> None:
        async with connected_role(
            options, settings, "control", roles.CONTROL, archive=kept, database=database
        ) as log:
            config = ControlConfig(
                sql=sql_setup(options, settings, database),
                retention_days=settings.retention_days,
                scaling=model_scaling(settings),
                driver=driver(settings),
                metrics=settings.control_metrics,
                reserve=installation(options).reserve(options.nats, os.environ),
                signing_key=installation(options).signing_key(),
            )
            await process.run(log, database, kept, config, stop=stop)

    signals.run_until_stopped(serve)
