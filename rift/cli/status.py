"""`rift status`: what runs and where, what waits, what lags, and what does not answer.

Two witnesses: the log itself, which knows the fleet, and the control leader, which knows the rest. Whoever is
silent is named, what the other knows is shown all the same, and the exit status is 1.
"""

import json
import platform
from argparse import Namespace
from typing import Any

import anyio

from events import fleet as fleets
from events import subjects
from events.jetstream import JetStream
from events.log import LogError
from replay.warehouse.result import QueryResult
from rift import __version__
from rift.cli.connection import installation
from rift.cli.output import CommandFailed, first_of, table, with_log
from rift.data_dir import DataDirError
from rift.rpc import AnyQuestion, AskLanes, AskLeader, QuestionRefused, Sql, ask_leader
from rift.settings import SHARDS

# Who looks waits no longer for one answer; control's own answers take a tenth of a second.
ANSWER_S = 5.0

# Gateways report every 3 s: a leader that was elected just now has heard of none.
LANES_S = 4.0
LOOK_S = 0.2

# Beyond it a gateway has missed three of its reports, and is about to be called lost.
SILENT_MS = 9000

QUEUES = """
select model, count(*) filter (where state = 'queued') as queued,
    count(*) filter (where state = 'running') as running
from requests where finished_position is null group by model
"""
REPLICAS = """
select replica, model, state, engine, hardware, slots, running from replicas
where ended_at_ns is null order by model, first_seen_at_ns
"""
LAG = (
    "select stream, sequence, behind, behind_ns // 1000000 as behind_ms, stopped_why from lag order by stream"
)

Rows = list[dict[str, Any]]


def status(options: Namespace) -> None:
    """Raises CommandFailed naming what is amiss, after all the rest is shown."""
    found: dict[str, Any] = {
        "rift": __version__,
        "python": platform.python_version(),
        "data": str(installation(options).folder),
        "problems": [],
    }
    try:
        found |= with_log(options, _look)
    except* (DataDirError, LogError) as nobody:
        found["problems"].append(first_of(nobody))
    print(json.dumps(found, ensure_ascii=False) if options.json else _shown(found))
    if found["problems"]:
        raise CommandFailed("; ".join(found["problems"]))


async def _look(log: JetStream) -> dict[str, Any]:
    """Raises LogError where the log does not answer."""
    fleet = await fleets.read(log)
    streams = {
        stream: await _size(log, stream) for stream in (*subjects.folded(range(SHARDS)), subjects.KEYS)
    }
    problems: list[str] = []
    leader: dict[str, Any] | None = None
    lanes: dict[str, int] | None = None
    queues: Rows = []
    replicas: Rows = []
    lag: Rows = []
    try:
        leader = await _ask(log, AskLeader())
        lanes = await _lanes(log)
        queues, replicas, lag = [await _rows(log, select) for select in (QUEUES, REPLICAS, LAG)]
    except (LogError, QuestionRefused) as error:
        problems.append(f"no control process answers as leader: {error}")
    problems += [f"{row['stream']} is not read on: {row['stopped_why']}" for row in lag if row["stopped_why"]]
    if lanes is not None and not any(silent_ms <= SILENT_MS for silent_ms in lanes.values()):
        problems.append("no gateway lives")
    waiting = {row.pop("model"): row for row in queues}
    models = [
        {
            "model": model,
            "wanted": fleet.wanted.get(model, 0),
            **{state: fleet.count(model, state) for state in ("ready", "starting", "draining")},
            **(
                waiting.get(model, {"queued": 0, "running": 0})
                if leader
                else {"queued": None, "running": None}
            ),
            "failed_starts": started.failed if (started := fleet.starts.get(model)) else 0,
            "why": started.why if started else "",
        }
        for model in sorted(
            {*fleet.wanted, *waiting, *(name for name, live in fleet.replicas.items() if live)}
        )
    ]
    folded = {row.pop("stream"): row for row in lag}
    return {
        "nats_server": log.server_version,
        "nats": log.server_address,
        "leader": leader,
        "gateways": None
        if lanes is None
        else [{"lane": lane, "silent_ms": ms} for lane, ms in lanes.items()],
        "models": models,
        "replicas": replicas,
        "streams": [{"stream": name, **size, **folded.get(name, {})} for name, size in streams.items()],
        "problems": problems,
    }


async def _size(log: JetStream, stream: str) -> dict[str, int]:
    room = await log.room_bytes(stream)
    capacity = await log.capacity_bytes(stream)
    return {"bytes": capacity - room, "room_bytes": room}


async def _lanes(log: JetStream) -> dict[str, int]:
    """Return how long each gateway has been silent; none only if none spoke meanwhile."""
    lanes: dict[str, int] = {}
    with anyio.move_on_after(LANES_S):
        while not lanes:
            lanes = await _ask(log, AskLanes())
            await anyio.sleep(0 if lanes else LOOK_S)
    return lanes


async def _ask(log: JetStream, question: AnyQuestion) -> Any:
    return await ask_leader(log, question, timeout_s=ANSWER_S)


async def _rows(log: JetStream, select: str) -> Rows:
    answer = QueryResult(**await _ask(log, Sql(select)))
    return [dict(zip(answer.columns, row, strict=True)) for row in answer.rows]


# --- for people ------------------------------------------------------------------------------------------


def _shown(found: dict[str, Any]) -> str:
    lines = [f"rift {found['rift']}, Python {found['python']}, in {found['data']}"]
    if "streams" in found:
        leader = found["leader"]
        gateways = found["gateways"]
        lines += [
            f"log       nats-server {found['nats_server']} at {found['nats']}",
            f"control   {leader['control']} leads in epoch {leader['epoch']}"
            if leader
            else "control   nobody leads",
            f"gateways  {_gateways(gateways)}",
            "",
            _table(
                found["models"], ("model", "wanted", "ready", "starting", "draining", "queued", "running")
            ),
        ]
        failing = [model for model in found["models"] if model["failed_starts"]]
        lines += [f"{one['model']}: {one['failed_starts']} starts failed: {one['why']}" for one in failing]
        if found["replicas"]:
            lines += ["", _table(found["replicas"], tuple(found["replicas"][0]))]
        for stream in found["streams"]:
            stream |= {"MiB": stream["bytes"] >> 20, "room MiB": stream["room_bytes"] >> 20}
        columns = ("stream", "MiB", "room MiB", "sequence", "behind", "behind_ms")
        lines += ["", _table(found["streams"], columns)]
    return "\n".join(lines)


def _gateways(gateways: Rows | None) -> str:
    if gateways is None:
        return "not known without a leader"
    each = [f"{one['lane']} (heard {one['silent_ms'] / 1000:.1f} s ago)" for one in gateways]
    return ", ".join(each) or "none"


def _table(rows: Rows, columns: tuple[str, ...]) -> str:
    return table(QueryResult(list(columns), [[row.get(column) for column in columns] for row in rows]))
