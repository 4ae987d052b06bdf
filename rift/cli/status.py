"""`rift status`: running processes, queues, lag, and parts that fail or do not answer.

There are two sources: the log, which knows the fleet, and the control leader, which knows the rest. If one of
them does not answer, the command names it, shows what the other knows, and exits with status 1.
"""

import json
import os
import platform
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping
from typing import Any

import anyio

from events import fleet as fleets
from events import shards, subjects
from events.contracts import LANE_SILENT_S
from events.fleet import Fleet
from events.jetstream import JetStream
from events.log import LogError
from rift import __version__
from rift.cli.arguments import Commands, add_command
from rift.cli.connection import installation, with_log
from rift.cli.output import CommandFailed, first_message, table
from rift.data_dir import DataDirError
from rift.rpc import (
    AnyQuestion,
    AskLanes,
    AskLeader,
    AskProblems,
    AskStatus,
    ProjectionBlocked,
    QuestionRefused,
    ask_leader,
)

# How long the command waits for one answer. Control answers in about a tenth of a second.
ANSWER_S = 5.0

# Gateways report every 3 s, so a leader that has just been elected knows none of them yet.
LANES_S = 4.0
LANES_POLL_S = 0.2

# What a server is to a stream, from the best.
SERVER_STATES = ("leader", "current", "behind", "silent")

Rows = list[dict[str, Any]]


def add_parser(commands: "Commands[ArgumentParser]") -> None:
    add_command(
        commands, "status", status, "show what runs, is queued and lags; exit status 1 if there is a problem"
    )


def status(options: Namespace) -> None:
    """Show the status. Then raise CommandFailed if there is a problem."""
    report: dict[str, Any] = {
        "rift": __version__,
        "python": platform.python_version(),
        "data": str(installation(options).folder),
        "problems": [],
    }
    try:
        report |= with_log(options, _report)
    except* (DataDirError, LogError) as silent:
        report["problems"].append(first_message(silent))
    if (reserve := installation(options).reserve(options.nats, os.environ)) and reserve.file.exists():
        report["disk"] = {"folder": str(reserve.file.parent), "free_bytes": reserve.free_bytes}
        try:
            reserve.check()
        except OSError as error:
            report["problems"].append(f"{reserve.trouble()} ({error.strerror})")
    print(json.dumps(report, ensure_ascii=False) if options.json else _text(report))
    if report["problems"]:
        raise CommandFailed("; ".join(report["problems"]))


async def _report(log: JetStream) -> dict[str, Any]:
    """Return what log and leader know. Raises LogError if the log does not answer."""
    fleet = await fleets.read(log)
    streams = {
        stream: await _size(log, stream)
        for stream in (*subjects.folded(range(await shards.count(log))), subjects.KEYS)
    }
    brokers = await _brokers(log, streams)
    problems: list[str] = []
    leader: dict[str, Any] | None = None
    lanes: dict[str, int] | None = None
    projected: Mapping[str, Rows] = {"queues": [], "replicas": [], "lag": []}
    try:
        leader = await _ask(log, AskLeader())
        lanes = await _lanes(log)
        problems += await _ask(log, AskProblems())
        projected = await _ask(log, AskStatus())
    except ProjectionBlocked as blocked:
        # The first problem names the disk already.
        problems = problems or [str(blocked)]
    except (LogError, QuestionRefused) as error:
        problems.append(f"no control process answers as leader: {error}")
    problems += stops(projected["lag"])
    if lanes is not None and not any(silent_ms <= LANE_SILENT_S * 1000 for silent_ms in lanes.values()):
        problems.append("no gateway is alive")
    folded = {row.pop("stream"): row for row in projected["lag"]}
    return {
        "nats_server": log.server_version,
        "nats": log.server_address,
        "brokers": brokers,
        "leader": leader,
        "gateways": None
        if lanes is None
        else [{"lane": lane, "silent_ms": ms} for lane, ms in lanes.items()],
        "models": _models(fleet, projected["queues"], has_leader=leader is not None),
        "replicas": projected["replicas"],
        "streams": [{"stream": name, **size, **folded.get(name, {})} for name, size in streams.items()],
        "problems": [*_silent(brokers), *failing(fleet), *problems],
    }


def stops(lag: Rows) -> list[str]:
    """Return where and why the projection of each stream stopped."""
    return [
        f"the projection stopped at {row['stream']}:{row['stopped_sequence']}: {row['stopped_why']}"
        for row in lag
        if row["stopped_why"]
    ]


def _models(fleet: Fleet, queues: Rows, *, has_leader: bool) -> Rows:
    """Return a row for each model with a decision, a replica or an open request."""
    by_model = {row["model"]: {"queued": row["queued"], "running": row["running"]} for row in queues}
    none: Mapping[str, int | None] = dict.fromkeys(("queued", "running"), 0 if has_leader else None)
    live = (name for name, replicas in fleet.replicas.items() if replicas)
    return [
        {
            "model": model,
            "wanted": fleet.wanted.get(model, 0),
            **{state: fleet.count(model, state) for state in ("ready", "starting", "draining")},
            **by_model.get(model, none),
            "failed_starts": starts.failed if (starts := fleet.starts.get(model)) else 0,
            "why": starts.why if starts else "",
        }
        for model in sorted({*fleet.wanted, *by_model, *live})
    ]


async def _brokers(log: JetStream, streams: Iterable[str]) -> Mapping[str, str]:
    """Return the worst state of each server of a cluster over all streams; empty for a single server."""
    worst: dict[str, str] = {}
    for stream in streams:
        for server, state in (await log.stream_servers(stream)).items():
            worst[server] = max(worst.get(server, state), state, key=SERVER_STATES.index)
    return dict(sorted(worst.items()))


def _silent(brokers: Mapping[str, str]) -> list[str]:
    lost = [server for server, state in brokers.items() if state == "silent"]
    return [
        f"nats-server {server} does not answer the others, one of {len(brokers)} that hold the log"
        for server in lost
    ]


def failing(fleet: Fleet) -> list[str]:
    """Return the models whose last start failed and that have fewer ready replicas than wanted."""
    return [
        failure
        for model in sorted(fleet.starts)
        if (failure := fleet.failed_start(model)) and fleet.count(model, "ready") < fleet.wanted.get(model, 0)
    ]


async def _size(log: JetStream, stream: str) -> dict[str, int]:
    room = await log.room_bytes(stream)
    capacity = await log.capacity_bytes(stream)
    return {"bytes": capacity - room, "room_bytes": room}


async def _lanes(log: JetStream) -> dict[str, int]:
    """Return how long each gateway has been silent, in ms. Empty only if none reported within LANES_S."""
    lanes: dict[str, int] = {}
    with anyio.move_on_after(LANES_S):
        while not lanes:
            lanes = await _ask(log, AskLanes())
            await anyio.sleep(0 if lanes else LANES_POLL_S)
    return lanes


async def _ask(log: JetStream, question: AnyQuestion) -> Any:
    return await ask_leader(log, question, timeout_s=ANSWER_S)


# --- text output -----------------------------------------------------------------------------------------


def _text(report: dict[str, Any]) -> str:
    lines = [f"rift {report['rift']}, Python {report['python']}, in {report['data']}"]
    if disk := report.get("disk"):
        lines.append(f"disk      {disk['free_bytes'] >> 20} MiB free for {disk['folder']}")
    if "streams" in report:
        leader = report["leader"]
        lines += [
            f"log       nats-server {report['nats_server']} at {report['nats']}",
            *(f"broker    {server}: {state}" for server, state in report["brokers"].items()),
            f"control   {leader['control']} leads in epoch {leader['epoch']}"
            if leader
            else "control   no leader",
            *([f"standbys  {', '.join(leader['standbys'])}"] if leader and leader["standbys"] else []),
            f"gateways  {_gateways(report['gateways'])}",
            "",
            _table(
                report["models"], ("model", "wanted", "ready", "starting", "draining", "queued", "running")
            ),
        ]
        if report["replicas"]:
            for replica in report["replicas"]:
                replica["report"] = f"{replica.pop('silent_ms') / 1000:.1f} s ago"
            lines += ["", _table(report["replicas"], tuple(report["replicas"][0]))]
        for stream in report["streams"]:
            stream |= {"MiB": stream["bytes"] >> 20, "room MiB": stream["room_bytes"] >> 20}
        columns = ("stream", "MiB", "room MiB", "sequence", "behind", "behind_ms")
        lines += ["", _table(report["streams"], columns)]
    return "\n".join(lines)


def _gateways(gateways: Rows | None) -> str:
    if gateways is None:
        return "unknown without a leader"
    each = [f"{row['lane']} (last report {row['silent_ms'] / 1000:.1f} s ago)" for row in gateways]
    return ", ".join(each) or "none"


def _table(rows: Rows, columns: tuple[str, ...]) -> str:
    return table(columns, [[row.get(column) for column in columns] for row in rows])
