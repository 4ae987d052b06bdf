"""The streams that requests are divided over: `rift shards list`, `rift shards add`."""

import os
from argparse import ArgumentParser, Namespace
from typing import Any

import anyio
from msgspec.structs import replace

from events import shards, subjects
from events.jetstream import JetStream
from events.log import LogError
from rift.broker.roles import CONTROL, OPERATOR
from rift.cli import signals
from rift.cli.arguments import Commands, add_command, add_config, add_group
from rift.cli.connection import connected, connected_role, installation, load_settings, with_log
from rift.cli.output import CommandFailed, print_list
from rift.rpc import AskShards, ask_leader
from rift.settings import SHARDS_MAX, Settings

# The leader reads the book at once.
SUPERVISED_WITHIN_S = 10.0
POLL_S = 0.2
ANSWER_S = 2.0


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    actions = add_group(commands, "shards", "list and add the streams that requests are divided over")
    add_command(actions, "list", show, "list the shards, their space and their gateways")
    new = add_command(actions, "add", add, "open another shard while everything runs", has_json=False)
    add_config(new)


def show(options: Namespace) -> None:
    async def read(log: JetStream) -> list[dict[str, Any]]:
        gateways = await _gateways(log)
        return [await _row(log, shard, gateways) for shard in range(await shards.count(log))]

    print_list(with_log(options, read), as_json=options.json, formats={})


def add(options: Namespace) -> None:
    settings = load_settings(options)
    reserve = installation(options).reserve(options.nats, os.environ)
    if reserve is not None and not reserve.is_whole():
        raise CommandFailed(f"no shard was opened: {reserve.trouble()}")

    async def run() -> None:
        async with connected(options, "cli", OPERATOR) as log:
            opened = await shards.count(log)
        wanted = _checked(settings, opened + 1)
        # As control does at its start, this creates the streams that the settings name. Operators may not.
        async with connected_role(options, wanted, "cli", CONTROL) as log:
            print(f"shard {opened} is open: stream {subjects.shard_stream(opened)}")
            print(await _supervised(log, opened))

    signals.run(run)


def _checked(settings: Settings, wanted: int) -> Settings:
    """Return the settings with another shard. Raises CommandFailed."""
    if wanted > SHARDS_MAX:
        raise CommandFailed(f"an installation has at most {SHARDS_MAX} shards")
    if settings.shards is not None and settings.shards < wanted:
        raise CommandFailed(
            f"nothing was changed: rift.toml has shards = {settings.shards}, and no process would start with "
            f"fewer than the log has; set shards = {wanted} or remove the line, then run this again"
        )
    return replace(settings, shards=wanted)


async def _supervised(log: JetStream, shard: int) -> str:
    with anyio.move_on_after(SUPERVISED_WITHIN_S):
        while shard not in await _gateways(log):  # noqa: ASYNC110
            await anyio.sleep(POLL_S)
        return (
            "the leader supervises it; a gateway chooses its shard when it starts: start more gateways, or "
            "restart them one after the other"
        )
    return "no leader supervises it yet; gateways use it once one does: see `rift status`"


async def _gateways(log: JetStream) -> dict[int, int]:
    """Return the number of live gateways of each shard that the leader supervises."""
    try:
        rows = await ask_leader(log, AskShards(), timeout_s=ANSWER_S)
    except LogError:
        return {}
    return {row["shard"]: row["gateways"] for row in rows}


async def _row(log: JetStream, shard: int, gateways: dict[int, int]) -> dict[str, Any]:
    stream = subjects.shard_stream(shard)
    row: dict[str, Any] = {"shard": shard, "stream": stream, "gateways": gateways.get(shard)}
    try:
        room = await log.room_bytes(stream)
        return row | {"bytes": await log.capacity_bytes(stream) - room, "room_bytes": room}
    except LogError:
        return row | {"bytes": None, "room_bytes": None}
