"""Decisions as events, and their verification: from the inputs, and the inputs from the log.

`inputs` of a `ScaleDecided` are the fields of Demand, Replicas, Policy and Hardware, each under its part's
name: `demand.waiting`, `policy.replicas_max`.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from events.fleet import Fleet
from events.schema import (
    ControlElected,
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
    ReplicaStarting,
    ReplicaStopped,
    ScaleDecided,
)
from events.subjects import FLEET
from replay.scaling.demand import Demand, Replicas
from replay.scaling.demand_query import Moment, observed, replicas
from replay.scaling.hardware import Hardware
from replay.scaling.policy import POLICY, Decision, Policy, decide, limit
from replay.sql_files import sql
from replay.warehouse.result import QueryResult
from replay.warehouse.warehouse import Warehouse


class Inputs(msgspec.Struct, frozen=True):
    """All inputs of a decision."""

    demand: Demand
    replicas: Replicas
    policy: Policy
    hardware: Hardware

    def decide(self) -> Decision | None:
        return decide(self.demand, self.replicas, self.policy, self.hardware)

    def limit(self) -> str:
        return limit(self.demand, self.replicas, self.policy, self.hardware)

    def flat(self) -> dict[str, int]:
        """Return every number under its part's name, as the event stores them."""
        flat: dict[str, int] = {}
        for part, fields in msgspec.to_builtins(self).items():
            for name, value in fields.items():
                match value:
                    case int():
                        flat[f"{part}.{name}"] = value
                    case list() | tuple():
                        flat |= {f"{part}.{name}.{at}": n for at, n in enumerate(value)}
        return flat


def parsed(inputs: Mapping[str, int]) -> Inputs:
    """Parse flat inputs. Raises msgspec.ValidationError if another version of the policy wrote them."""
    parts: dict[str, dict[str, Any]] = {"hardware": {"source": ""}}
    for name, value in inputs.items():
        part, _, rest = name.partition(".")
        field, _, at = rest.partition(".")
        values = parts.setdefault(part, {})
        if at:
            values.setdefault(field, {})[at] = value
        else:
            values[field] = value
    for values in parts.values():
        for field, items in values.items():
            if isinstance(items, dict):
                values[field] = [items[at] for at in sorted(items, key=int)]
    return msgspec.convert(parts, Inputs)


def differences(warehouse: Warehouse) -> Iterator[str]:
    """Yield a line for each decision of this policy version that cannot be reproduced.

    Raises QueryRefused.
    """
    decisions, events = warehouse.read((sql("scaling/decided"), []), (sql("scaling/fleet"), []))
    fleet = Fleet()
    past = _events(events)
    pending = next(past, None)
    for row in decisions.rows:
        decided = dict(zip(decisions.columns, row, strict=True))
        positions = json.loads(decided["positions"])
        while pending is not None and pending[1] <= positions.get(FLEET, 0):
            fleet.apply(*pending)
            pending = next(past, None)
        if decided["policy"] == POLICY and (why := _difference(warehouse, fleet, decided, positions)):
            yield f"decision {decided['position']} on {decided['model']}: {why}"


def fleet_of(warehouse: Warehouse) -> Fleet:
    """Return the fleet as of the last applied record, including events that were trimmed from the log.

    Reports are not read, so `heard_at_ns` of a replica may be too early. Raises QueryRefused.
    """
    events, applied = warehouse.read(
        (sql("scaling/fleet"), []),
        ("select sequence, stored_at_ns from facts.applied where stream = ?", [FLEET]),
    )
    fleet = Fleet()
    for event in _events(events):
        fleet.apply(*event)
    for sequence, stored_at_ns in applied.rows:
        fleet.apply(None, sequence, stored_at_ns)
    return fleet


def _difference(
    warehouse: Warehouse, fleet: Fleet, decided: Mapping[str, Any], positions: Mapping[str, int]
) -> str | None:
    recorded = json.loads(decided["inputs"])
    try:
        inputs = parsed(recorded)
    except msgspec.ValidationError as error:
        return f"its inputs are not those of policy {POLICY!r}: {error}"
    model = decided["model"]
    moment = Moment(positions, decided["decided_at_ns"])
    demand, reports = observed(warehouse.read, model, moment, idle_ns=inputs.policy.idle_ns)
    recomputed = msgspec.structs.replace(
        inputs, demand=demand, replicas=replicas(fleet, model, inputs.hardware, reports)
    )
    current = recomputed.flat()
    if changed := {name: (recorded.get(name), n) for name, n in current.items() if recorded.get(name) != n}:
        return "; ".join(f"{name} was {then}, and is {now}" for name, (then, now) in changed.items())
    expected = Decision(decided["to_replicas"], decided["reason"])
    if (decision := recomputed.decide()) != expected:
        return f"it was {expected.to_replicas} ({expected.reason}), and is {decision}"
    return None


def _events(rows: QueryResult) -> Iterator[tuple[object, int, int]]:
    """Yield the fleet's events, each with its sequence and stored time."""
    for row in rows.rows:
        fields = dict(zip(rows.columns, row, strict=True))
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
