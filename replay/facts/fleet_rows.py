"""The fleet's events, read back from their rows, with what `events.fleet` needs of them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from events.schema import (
    ControlElected,
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
    ReplicaStarting,
    ReplicaStopped,
    ScaleDecided,
    ScalePlanned,
)

# The columns of `sql/scaling/fleet.sql`.
COLUMNS = (
    *("position", "at_ns", "event", "model", "replica", "start_ns", "epoch", "control", "from_replicas"),
    *("to_replicas", "decided_at_ns", "positions", "is_missed", "policy", "sequence"),
)


def fleet_events(rows: Iterable[Sequence[Any]]) -> Iterator[tuple[object, int, int]]:
    """Yield the event of each row, with its sequence and stored time."""
    for row in rows:
        fields = dict(zip(COLUMNS, row, strict=True))
        yield _event(fields), fields["sequence"], fields["at_ns"]


def _event(fields: Mapping[str, Any]) -> object:
    model = fields["model"]
    identity = {"replica": fields["replica"], "model": fields["model"]}
    match fields["event"]:
        case "elected":
            return ControlElected(epoch=fields["epoch"], control=fields["control"])
        case "decided":
            return ScaleDecided(
                model=model,
                from_replicas=fields["from_replicas"],
                to_replicas=fields["to_replicas"],
                reason="",
                policy="",
                positions=json.loads(fields["positions"]),
                decided_at_ns=fields["decided_at_ns"],
                inputs={},
                epoch=fields["epoch"],
            )
        case "planned":
            return ScalePlanned(
                model=model,
                floor=fields["from_replicas"],
                restart=fields["to_replicas"],
                policy=fields["policy"],
                positions={},
                from_ns=0,
                planned_at_ns=fields["decided_at_ns"],
                requests=0,
                sha256="0" * 64,
                inputs={},
                is_missed=fields["is_missed"],
                epoch=fields["epoch"],
            )
        case "starting":
            return ReplicaStarting(**identity, engine="")
        case "ready":
            return ReplicaReady(**identity, slots=0, start_ns=fields["start_ns"])
        case "draining":
            return ReplicaDraining(**identity)
        case "stopped":
            return ReplicaStopped(**identity)
        case "lost":
            return ReplicaLost(**identity, why="")
    raise AssertionError(f"{fields['event']} is no event of the fleet")
