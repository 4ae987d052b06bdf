"""Decisions as events, and their verification: from the inputs, and the inputs from the log.

`inputs` of a `ScaleDecided` are the fields of Demand, Replicas, Policy and Hardware, each under its part's
name: `demand.waiting`, `policy.replicas_max`.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from events.fleet import Fleet
from events.schema import ScaleDecided
from events.subjects import FLEET
from replay.facts.fleet_rows import fleet_events
from replay.scaling.demand import Demand, Replicas
from replay.scaling.demand_query import Moment, arrivals, observed, replicas
from replay.scaling.floor import FloorTerms, Plan, digest, held, planned, too_long
from replay.scaling.hardware import Hardware
from replay.scaling.policy import NO_FLOOR, POLICY, Decision, Floor, Policy, decide, limit, speed_permille
from replay.sql_files import sql
from replay.warehouse.warehouse import Warehouse


class Inputs(msgspec.Struct, frozen=True):
    """All inputs of a decision."""

    demand: Demand
    replicas: Replicas
    policy: Policy
    hardware: Hardware
    floor: Floor = NO_FLOOR

    def decide(self) -> Decision | None:
        return decide(self.demand, self.replicas, self.policy, self.hardware, self.floor)

    def decided(self, model: str, moment: Moment, *, epoch: int) -> ScaleDecided | None:
        """Return the decision as an event, or None to keep the latest."""
        if (decision := self.decide()) is None:
            return None
        return ScaleDecided(
            model=model,
            from_replicas=self.replicas.wanted,
            to_replicas=decision.to_replicas,
            reason=decision.reason,
            policy=POLICY,
            positions=dict(moment.positions),
            decided_at_ns=moment.now_ns,
            inputs=self.flat(),
            epoch=epoch,
            plan=self.floor.plan,
        )

    def limit(self) -> str:
        return limit(self.demand, self.replicas, self.policy, self.hardware, self.floor)

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
    """Yield a line for each decision and plan of this policy version that cannot be reproduced.

    Raises QueryRefused.
    """
    for name, relation, difference in (
        ("decision", "scaling/decided", _difference),
        ("plan", "scaling/planned", _plan_difference),
    ):
        made, events = warehouse.read((sql(relation), []), (sql("scaling/fleet"), []))
        fleet = Fleet()
        past = fleet_events(events.rows)
        pending = next(past, None)
        for row in made.rows:
            one = dict(zip(made.columns, row, strict=True))
            positions = json.loads(one["positions"])
            while pending is not None and pending[1] <= positions.get(FLEET, 0):
                fleet.apply(*pending)
                pending = next(past, None)
            if one["policy"] == POLICY and (why := difference(warehouse, fleet, one, positions)):
                yield f"{name} {one['position']} on {one['model']}: {why}"


def unverified(warehouse: Warehouse) -> int:
    """Return how many decisions and plans other versions of the policy made. Raises QueryRefused."""
    (result,) = warehouse.read((sql("scaling/unverified"), {"policy": POLICY}))
    count: int = result.rows[0][0]
    return count


def fleet_of(warehouse: Warehouse) -> Fleet:
    """Return the fleet as of the last applied record, including events that were trimmed from the log.

    Reports are not read, so `heard_at_ns` of a replica may be too early. Raises QueryRefused.
    """
    events, applied = warehouse.read(
        (sql("scaling/fleet"), []),
        ("select sequence, stored_at_ns from facts.applied where stream = ?", [FLEET]),
    )
    fleet = Fleet()
    for event in fleet_events(events.rows):
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
    demand, reports = observed(warehouse.read, model, moment, inputs.hardware, idle_ns=inputs.policy.idle_ns)
    recomputed = msgspec.structs.replace(
        inputs,
        demand=demand,
        replicas=replicas(fleet, model, inputs.hardware, reports),
        floor=held(fleet.plans.get(model, ()), moment.now_ns),
    )
    current = recomputed.flat()
    if changed := {name: (recorded.get(name), n) for name, n in current.items() if recorded.get(name) != n}:
        return "; ".join(f"{name} was {then}, and is {now}" for name, (then, now) in changed.items())
    expected = Decision(decided["to_replicas"], decided["reason"])
    if (decision := recomputed.decide()) != expected:
        return f"it was {expected.to_replicas} ({expected.reason}), and is {decision}"
    return None


def _plan_difference(
    warehouse: Warehouse, fleet: Fleet, made: Mapping[str, Any], positions: Mapping[str, int]
) -> str | None:
    try:
        recorded = msgspec.convert(json.loads(made["inputs"]), FloorTerms)
    except msgspec.ValidationError as error:
        return f"its inputs are not those of policy {POLICY!r}: {error}"
    model = made["model"]
    moment = Moment(positions, made["planned_at_ns"])
    hardware = recorded.hardware
    demand, reports = observed(warehouse.read, model, moment, hardware, idle_ns=0)
    plans = fleet.plans.get(model, ())
    known_start_ns = fleet.start_ns(model)
    terms = msgspec.structs.replace(
        recorded,
        guess=plans[-1].floor if plans else 0,
        start_ns=recorded.start_ns if known_start_ns is None else known_start_ns,
        speed_permille=speed_permille(demand, replicas(fleet, model, hardware, reports), hardware),
    )
    if terms != recorded:
        return f"it was made with {recorded}, and is with {terms}"
    past = arrivals(warehouse.read, model, moment, long_tokens=too_long(terms.ttft_ms, hardware))
    if (sha256 := digest(past, terms)) != made["sha256"]:
        return f"the SHA-256 of its arrivals was {made['sha256']}, and is {sha256}"
    then = Plan(
        replicas=made["floor"],
        restart=made["restart"],
        counted=made["requests"],
        candidates=_pairs(made["candidates"]),
        restarts=_pairs(made["restarts"]),
        is_missed=made["is_missed"],
    )
    return None if (now := planned(past, terms)) == then else f"it was {then}, and is {now}"


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    return msgspec.json.decode(text, type=tuple[tuple[int, int], ...])
