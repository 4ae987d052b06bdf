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
from replay.scaling.policy import POLICY, Decision, Policy, decide
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

    def flat(self) -> dict[str, int]:
        """Return every number under its part's name, as the event stores them."""
        flat: dict[str, int] = {}
        for part, fields in msgspec.to_builtins(self).items():
            for name, told in fields.items():
                match told:
                    case int():
                        flat[f"{part}.{name}"] = told
                    case list() | tuple():
                        flat |= {f"{part}.{name}.{at}": n for at, n in enumerate(told)}
        return flat


def parsed(inputs: Mapping[str, int]) -> Inputs:
    """Parse flat inputs. Raises msgspec.ValidationError if another version of the policy wrote them."""
    parts: dict[str, dict[str, Any]] = {"hardware": {"source": ""}}
    for name, value in inputs.items():
        part, _, rest = name.partition(".")
        field, _, at = rest.partition(".")
        told = parts.setdefault(part, {})
        if at:
            told.setdefault(field, {})[at] = value
        else:
            told[field] = value
    for told in parts.values():
        for field, of in told.items():
            if isinstance(of, dict):
                told[field] = [of[at] for at in sorted(of, key=int)]
    return msgspec.convert(parts, Inputs)


def differences(warehouse: Warehouse) -> Iterator[str]:
    """Yield a line for each decision of this policy version that cannot be reproduced.

    Raises QueryRefused.
    """
    told, events = warehouse.read((sql("scaling/decided"), []), (sql("scaling/fleet"), []))
    fleet = Fleet()
    past = _events(events)
    pending = next(past, None)
    for row in told.rows:
        decided = dict(zip(told.columns, row, strict=True))
        positions = json.loads(decided["positions"])
        while pending is not None and pending[1] <= positions.get(FLEET, 0):
            fleet.apply(*pending)
            pending = next(past, None)
        if decided["policy"] == POLICY and (why := _difference(warehouse, fleet, decided, positions)):
            yield f"decision {decided['position']} on {decided['model']}: {why}"


def fleet_of(warehouse: Warehouse) -> Fleet:
    """Return the fleet as far as it is applied, from its beginning, also of what was trimmed from the log.
    Of when each replica was heard last it knows only the beginning. Raises QueryRefused."""
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
    told = json.loads(decided["inputs"])
    try:
        inputs = parsed(told)
    except msgspec.ValidationError as error:
        return f"its inputs are not those of policy {POLICY!r}: {error}"
    model = decided["model"]
    moment = Moment(positions, decided["decided_at_ns"])
    demand, reports = observed(warehouse.read, model, moment, idle_ns=inputs.policy.idle_ns)
    found = msgspec.structs.replace(
        inputs, demand=demand, replicas=replicas(fleet, model, inputs.hardware, reports)
    )
    again = found.flat()
    if changed := {name: (told.get(name), n) for name, n in again.items() if told.get(name) != n}:
        return "; ".join(f"{name} was {then}, and is {now}" for name, (then, now) in changed.items())
    wanted = Decision(decided["to_replicas"], decided["reason"])
    if (decision := found.decide()) != wanted:
        return f"it was {wanted.to_replicas} ({wanted.reason}), and is {decision}"
    return None


def _events(rows: QueryResult) -> Iterator[tuple[object, int, int]]:
    """Yield the fleet's events, each with its sequence and stored time."""
    for row in rows.rows:
        told = dict(zip(rows.columns, row, strict=True))
        yield _event(told), told["sequence"], told["at_ns"]


def _event(told: Mapping[str, Any]) -> object:
    model = told["model"]
    who = {"replica": told["replica"], "model": told["model"]}
    match told["event"]:
        case "elected":
            return ControlElected(epoch=told["epoch"], control=told["control"])
        case "decided":
            return ScaleDecided(
                model=model,
                from_replicas=told["from_replicas"],
                to_replicas=told["to_replicas"],
                reason="",
                policy="",
                positions=json.loads(told["positions"]),
                decided_at_ns=told["decided_at_ns"],
                inputs={},
                epoch=told["epoch"],
            )
        case "starting":
            return ReplicaStarting(**who, engine="")
        case "ready":
            return ReplicaReady(**who, slots=0, start_ns=told["start_ns"])
        case "draining":
            return ReplicaDraining(**who)
        case "stopped":
            return ReplicaStopped(**who)
        case "lost":
            return ReplicaLost(**who, why="")
    raise AssertionError(f"{told['event']} is no event of the fleet")
