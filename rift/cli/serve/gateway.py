"""`rift gateway`: one gateway process."""

import os
import secrets
from argparse import ArgumentParser, Namespace

import anyio

from events import ids
from replay.archive.folder import ArchiveFolder
from rift.broker import roles
from rift.cli import signals
from rift.cli.arguments import (
    Commands,
    add_command,
    add_engine,
    add_listen,
    add_metrics,
    add_workers,
    natural,
)
from rift.cli.connection import connected, connected_role, installation, role_settings
from rift.gateway import process
from rift.gateway.state import GatewayConfig
from rift.gateway.streams import shard_choice
from rift.metrics.address import gateway_port


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    parser = add_command(commands, "gateway", gateway, "run one gateway process", has_json=False)
    add_engine(parser)
    add_listen(parser)
    parser.add_argument(
        "--shard", type=natural, metavar="N", help="shard to use (default: the one with the fewest gateways)"
    )
    add_workers(parser)
    add_metrics(parser)


def gateway(options: Namespace) -> None:
    settings = role_settings(options)
    folder = installation(options)
    secret = folder.secret()

    async def serve(stop: anyio.Event) -> None:
        async with (
            connected_role(
                options, settings, "gateway", roles.GATEWAY, archive=ArchiveFolder(folder.archive)
            ) as log,
            connected(options, "gateway-history", roles.GATEWAY) as history_log,
        ):
            shard = await shard_choice.choose(log, options.shard, secrets.SystemRandom().random, stop)
            if shard is None:
                return
            config = GatewayConfig(
                shard=shard,
                lane=ids.new_lane_id(secrets.token_bytes(ids.RANDOM_BYTES)),
                secret=secret,
                models=settings.catalogue(),
                engine=settings.engine,
                served=frozenset(settings.scales()),
                seal_content=settings.seal_content,
                reserve=folder.reserve(options.nats, os.environ),
                retention_days=settings.retention_days,
                native_prompt_tokens_max=settings.native_prompt_tokens_max,
                entropy=secrets.token_bytes,
                metrics=settings.metrics_address(gateway_port(settings.port)),
                metrics_accounts=settings.metrics_accounts,
                ttft_ms={scale.ttft_ms for scale in settings.scales().values()},
            )
            await process.run(log, history_log, config, host=settings.host, port=settings.port, stop=stop)

    signals.run_until_stopped(serve)
