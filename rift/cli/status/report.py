"""Collect the processes, queues, speed, lag, and parts that fail or do not answer.

The log knows the fleet, and the leader knows the rest. If a part of them does not answer, the report names it
and has what the others know.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import anyio

from events import fleet as fleets
from events import shards, subjects
from events.contracts import LANE_SILENT_S, SECOND_NS
from events.fleet import Fleet
from events.jetstream import JetStream
from events.log import LogError, worst_states
from rift.rpc import (
    AnyQuestion,
    AskLanes,
    AskLeader,
    AskProblems,
    AskShards,
    AskStatus,
    ProjectionBlocked,
    QuestionRefused,
    ask_leader,
)

# How long the command waits for one answer. Control answers in about a tenth of a second, or after 4 s if it
# cannot apply every record; the log answers in milliseconds.
ANSWER_S = 6.0
LOG_S = 4.0

# Gateways report every 3 s, and a janitor first reads its shard, so a leader that has just been elected knows
# no gateway and supervises nothing.
SETTLE_S = 4.0
SETTLE_POLL_S = 0.2

# A follower that is still behind after this time is a problem. So is one that a new leader has not heard yet.
BEHIND_S = 1.0

# A failed start of a model that is scaled to zero is no longer a problem after this time: while requests wait
# for the model, its start is tried every ten minutes.
FAILED_START_S = 3600.0

Rows = list[dict[str, Any]]
Part = TypeVar("Part")


async def ask_all(log: JetStream) -> dict[str, Any]:
    """Return what log and leader know. All are asked at once, so that one that hangs delays no other."""
    asked = _Asked(log)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(asked.log)
        tasks.start_soon(asked.control)
    return asked.report()


class _Asked:
    """The answers of the log and of control. None: no answer."""

    def __init__(self, log: JetStream) -> None:
        self._log = log
        self._problems: list[str] = []
        self._fleet: Fleet | None = None
        self._shards: int | None = None
        self._streams: dict[str, dict[str, int]] = {}
        self._brokers: Mapping[str, str] = {}
        self._leader: dict[str, Any] | None = None
        self._lanes: dict[str, int] | None = None
        self._supervised: Rows | None = None
        self._projected: dict[str, Rows] | None = None

    # --- the log -------------------------------------------------------------------------------------

    async def log(self) -> None:
        self._fleet = await self._within(lambda: fleets.read(self._log), "the fleet's stream")
        self._shards = await self._within(lambda: shards.count(self._log), "the book")
        async with anyio.create_task_group() as tasks:
            for name in _stream_names(self._shards):
                tasks.start_soon(self._size, name)
        if not self._streams:
            return
        self._brokers = await self._servers()
        if not {"behind", "silent"}.isdisjoint(self._brokers.values()):
            await anyio.sleep(BEHIND_S)
            later = await self._servers()
            self._brokers = {
                server: later.get(server, state) if state in ("behind", "silent") else state
                for server, state in self._brokers.items()
            }

    async def _size(self, stream: str) -> None:
        async def read() -> dict[str, int]:
            room = await self._log.room_bytes(stream)
            last = await self._log.last_sequence(stream)
            return {"bytes": await self._log.capacity_bytes(stream) - room, "room_bytes": room, "last": last}

        if (size := await self._within(read, stream)) is not None:
            self._streams[stream] = size

    async def _within(self, ask: Callable[[], Awaitable[Part]], what: str) -> Part | None:
        """Return the log's answer, or None and a problem."""
        error: object = f"no answer within {LOG_S:g} s"
        with anyio.move_on_after(LOG_S):
            try:
                return await ask()
            except LogError as silent:
                error = silent
        self._problems.append(f"{what} does not answer: {error}")
        return None

    async def _servers(self) -> Mapping[str, str]:
        """Return the worst state of each server of a cluster over all streams; empty for a single server."""
        states: list[Mapping[str, str]] = []

        async def add(stream: str) -> None:
            states.append(await self._within(lambda: self._log.stream_servers(stream), stream) or {})

        async with anyio.create_task_group() as tasks:
            for stream in self._streams:
                tasks.start_soon(add, stream)
        return worst_states(states)

    # --- control -------------------------------------------------------------------------------------

    async def control(self) -> None:
        try:
            with anyio.fail_after(ANSWER_S):
                self._leader = await self._ask(AskLeader())
        except (LogError, QuestionRefused, TimeoutError) as error:
            why = str(error) or f"no answer within {ANSWER_S:g} s"
            self._problems.append(f"no control process answers as leader: {why}")
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._settled)
            tasks.start_soon(self._project)

    async def _settled(self) -> None:
        """Ask for gateways and shards until all of them are known, or for SETTLE_S."""
        with anyio.move_on_after(SETTLE_S):
            while not self._lanes or len(self._supervised or ()) < (self._shards or 1):
                try:
                    self._lanes = await self._ask(AskLanes())
                    self._supervised = await self._ask(AskShards())
                except (LogError, QuestionRefused):
                    pass
                await anyio.sleep(SETTLE_POLL_S)

    async def _project(self) -> None:
        try:
            with anyio.fail_after(ANSWER_S):
                self._problems += await self._ask(AskProblems())
                self._projected = await self._ask(AskStatus())
        except ProjectionBlocked as blocked:
            # The first problem names the disk already.
            if str(blocked) not in self._problems:
                self._problems.append(str(blocked))
        except (LogError, QuestionRefused, TimeoutError) as error:
            why = str(error) or f"no answer within {ANSWER_S:g} s"
            self._problems.append(f"control does not show its projection: {why}")

    async def _ask(self, question: AnyQuestion) -> Any:
        return await ask_leader(self._log, question, timeout_s=ANSWER_S)

    # --- both ----------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        lanes, projected = self._lanes, self._projected
        lag = {row["stream"]: row for row in projected["lag"]} if projected is not None else {}
        report: dict[str, Any] = {
            "leader": self._leader,
            "gateways": None
            if lanes is None
            else [{"lane": lane, "silent_ms": ms} for lane, ms in lanes.items()],
            "shards": self._shard_rows(),
            "stale_ms": self._stale_ms(lag),
            "problems": self._all_problems(lag),
        }
        if self._streams:
            report |= {
                "nats_server": self._log.server_version,
                "nats": self._log.server_address,
                "brokers": self._brokers,
                "streams": [
                    {"stream": name, **self._streams[name], **lag.get(name, {})}
                    for name in _stream_names(self._shards)
                    if name in self._streams
                ],
            }
        if self._fleet is not None:
            report["models"] = model_rows(self._fleet, projected)
        if projected is not None:
            report["replicas"] = projected["replicas"]
        report["metrics"] = self._metrics()
        return report

    def _metrics(self) -> Rows:
        """Return where each process serves its metrics, as far as it is known."""
        roles: list[tuple[str, Mapping[str, str]]] = [("control", (self._leader or {}).get("metrics", {}))]
        roles += [("gateway", row.get("metrics", {})) for row in self._supervised or ()]
        for replicas in self._fleet.replicas.values() if self._fleet else ():
            roles.append(("worker", {name: replica.metrics for name, replica in replicas.items()}))
        return [
            {"role": role, "name": name, "address": address}
            for role, addresses in roles
            for name, address in sorted(addresses.items())
            if address
        ]

    def _shard_rows(self) -> Rows | None:
        if self._shards is None or self._supervised is None:
            return None
        gateways = {row["shard"]: row["gateways"] for row in self._supervised}
        return [
            {"shard": shard, "supervised": shard in gateways, "gateways": gateways.get(shard)}
            for shard in range(self._shards)
        ]

    def _stale_ms(self, lag: Mapping[str, dict[str, Any]]) -> dict[str, int]:
        """Return the age of the figures of a projection that lacks records."""
        ages = [
            row["applied_ms"]
            for name, row in lag.items()
            if name in self._streams and row["sequence"] < self._streams[name]["last"]
        ]
        return dict.fromkeys(("models", "replicas"), max(ages)) if ages else {}

    def _all_problems(self, lag: Mapping[str, dict[str, Any]]) -> list[str]:
        problems = [*unwell(self._brokers)]
        if self._fleet:
            problems += [*failing(self._fleet), *losing(self._fleet)]
        problems += self._problems
        problems += stops(list(lag.values()))
        if self._lanes is not None and all(ms > LANE_SILENT_S * 1000 for ms in self._lanes.values()):
            problems.append("no gateway is alive")
        problems += [
            f"nobody supervises shard {row['shard']}: its requests may never end"
            for row in self._shard_rows() or ()
            if not row["supervised"]
        ]
        return list(dict.fromkeys(problems))


def _stream_names(shards: int | None) -> list[str]:
    """Return the streams to show, in the order of their shards."""
    return [*subjects.folded(range(shards or 1)), subjects.KEYS]


def stops(lag: Rows) -> list[str]:
    """Return where and why the projection of each stream stopped."""
    return [
        f"the projection stopped at {row['stream']}:{row['stopped_sequence']}: {row['stopped_why']}"
        for row in lag
        if row["stopped_why"]
    ]


def model_rows(fleet: Fleet, projected: Mapping[str, Rows] | None) -> Rows:
    """Return a row for each model with a decision, a replica or an open request."""
    by_model: dict[str, dict[str, Any]] = {}
    for part in ("queues", "speed", "limits"):
        for row in (projected or {}).get(part, ()):
            by_model.setdefault(row["model"], {}).update(row)
    unknown = 0 if projected is not None else None
    live = (name for name, replicas in fleet.replicas.items() if replicas)
    rows: Rows = []
    for model in sorted({*fleet.wanted, *by_model, *live}):
        starts = fleet.starts.get(model)
        known = by_model.get(model, {})
        limits = [known.get("limit", ""), fleet.failed_start(model)]
        rows.append(
            {
                "model": model,
                "wanted": fleet.wanted.get(model, 0),
                **{state: fleet.count(model, state) for state in ("ready", "starting", "draining")},
                **{name: known.get(name, unknown) for name in ("queued", "running", "tokens_per_s")},
                **{name: known.get(name) for name in ("ttft_p50_ms", "ttft_p99_ms")},
                "failed_starts": starts.failed if starts else 0,
                "why": starts.why if starts else "",
                "limit": "; ".join(filter(None, limits)),
            }
        )
    return rows


def unwell(brokers: Mapping[str, str]) -> list[str]:
    """Return the servers of a cluster that do not answer the others, or do not keep up with them."""
    words = {
        "silent": "does not answer the others",
        "behind": f"has been behind the others for {BEHIND_S:g} s",
    }
    if "leaderless" in brokers.values():
        return [
            f"the nats-servers that hold the log ({', '.join(brokers)}) have no leader for it: more than "
            "half of them must run and reach each other; start those that do not run, and ask again after "
            "the 10 s that an election takes"
        ]
    return [
        f"nats-server {server} {words[state]}, one of {len(brokers)} that hold the log"
        for server, state in brokers.items()
        if state in words
    ]


def failing(fleet: Fleet) -> list[str]:
    """Return the models whose last start failed and that have too few ready replicas. A model that is scaled
    to zero counts for FAILED_START_S, because the policy may have stopped its starts."""
    long_ago_ns = fleet.at_ns - int(FAILED_START_S * SECOND_NS)
    return [
        failure
        for model, starts in sorted(fleet.starts.items())
        if (failure := fleet.failed_start(model))
        and fleet.count(model, "ready")
        < max(fleet.wanted.get(model, 0), 1 if starts.failed_at_ns > long_ago_ns else 0)
    ]


def losing(fleet: Fleet) -> list[str]:
    """Return the models that lost replicas and have too few ready ones. A model without a decision, whose
    workers Rift does not start, needs one."""
    return [
        f"{model} has {ready} of {wanted} replicas ready, lost within minutes: {losses.count}, "
        f"the last: {losses.why or 'unknown'}; `rift ask lost-replicas` shows whose requests"
        for model in sorted(fleet.losses)
        if (losses := fleet.recent_losses(model))
        and (ready := fleet.count(model, "ready")) < (wanted := fleet.wanted.get(model, 1))
    ]
