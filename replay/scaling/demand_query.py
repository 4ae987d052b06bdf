"""The Demand of `demand.py` from the warehouse, as of any positions of the log.

The result never changes once these positions are applied, because later facts are ignored.
"""

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from events.fleet import Fleet
from events.subjects import FLEET
from replay.scaling.arrivals import (
    REQUESTS_LONG,
    REQUESTS_MIN,
    SLOT_NS,
    WINDOW_NS,
    WINDOW_NS_LONG,
    WINDOW_NS_MAX,
    Arrivals,
    Slot,
)
from replay.scaling.demand import ENDED_NS, MINUTE_NS, PAST_NS, PASTS, SPEED_NS, Demand, Replicas
from replay.scaling.hardware import Hardware
from replay.sql_files import sql
from replay.warehouse.queries import Question
from replay.warehouse.result import QueryResult
from replay.warehouse.warehouse import Warehouse

Read = Callable[..., list[QueryResult]]

WINDOWS = {
    "minute_ns": MINUTE_NS,
    "past_ns": PAST_NS,
    "pasts": PASTS,
    "ended_ns": ENDED_NS,
    "speed_ns": SPEED_NS,
}

# Requests accepted earlier are ignored. Deadlines are minutes, so these requests have ended, and they no
# longer count after ENDED_NS and the idle time.
SINCE_NS = 2 * ENDED_NS


class Moment(msgspec.Struct, frozen=True):
    """The known position of each stream, and the time."""

    positions: Mapping[str, int]
    now_ns: int


def observed(
    read: Read, model: str, moment: Moment, hardware: Hardware, *, idle_ns: int
) -> tuple[Demand, tuple[int, int]]:
    """Return a model's demand, and the sums of its replicas' reports (see `Replicas`).

    Raises QueryRefused.
    """
    demand, reports = read(_demand(model, moment, idle_ns), _reports(model, moment, hardware))
    fields = dict(zip(demand.columns, demand.rows[0], strict=True))
    running, tokens_per_ks = reports.rows[0]
    return msgspec.convert(fields, Demand), (running, tokens_per_ks)


def arrivals(read: Read, model: str, moment: Moment, *, long_tokens: int) -> Arrivals:
    """Return a model's recent arrivals in slots. Raises QueryRefused."""
    parameters = {
        "model": model,
        **_cut(moment),
        "slot_ns": SLOT_NS,
        "day_ns": ((moment.now_ns - WINDOW_NS_MAX) // SLOT_NS + 1) * SLOT_NS - 1,
        "since": (moment.now_ns - WINDOW_NS) // SLOT_NS,
        "since_long": (moment.now_ns - WINDOW_NS_LONG) // SLOT_NS,
        "requests_long": REQUESTS_LONG,
        "requests_min": REQUESTS_MIN,
        "long_tokens": long_tokens,
    }
    (result,) = read((sql("scaling/arrivals"), parameters))
    oldest = result.rows[0][-1] if result.rows else 0
    return Arrivals(moment.now_ns, oldest, [Slot(*row[:-1]) for row in result.rows])


def stored_at_ns(warehouse: Warehouse) -> int:
    """Return the largest applied stored time, 0 if nothing is applied."""
    (result,) = warehouse.read(("select coalesce(max(stored_at_ns), 0) from facts.applied", []))
    at_ns: int = result.rows[0][0]
    return at_ns


def _demand(model: str, moment: Moment, idle_ns: int) -> Question:
    times = {"now_ns": moment.now_ns, "since_ns": moment.now_ns - SINCE_NS - idle_ns}
    return sql("scaling/demand"), {"model": model, **_cut(moment), **times, **WINDOWS}


def _cut(moment: Moment) -> dict[str, Any]:
    shards = {stream: last for stream, last in moment.positions.items() if stream != FLEET}
    return {"streams": list(shards), "sequences": list(shards.values())}


def _reports(model: str, moment: Moment, hardware: Hardware) -> Question:
    parameters: dict[str, Any] = {"model": model, "now_ns": moment.now_ns, "speed_ns": SPEED_NS}
    steps = {"step_us": hardware.step_us, "step_us_per_running": hardware.step_us_per_running}
    return sql("scaling/reports"), {**parameters, **steps, "fleet": moment.positions.get(FLEET, 0)}


def replicas(fleet: Fleet, model: str, hardware: Hardware, reports: tuple[int, int] = (0, 0)) -> Replicas:
    """Return a model's replicas as the fleet is."""
    starts = fleet.starts.get(model)
    decided = fleet.decided.get(model)
    start_ns = fleet.start_ns(model)
    return Replicas(
        wanted=fleet.wanted.get(model, 0),
        ready=fleet.count(model, "ready"),
        starting=fleet.count(model, "starting"),
        draining=fleet.count(model, "draining"),
        start_ns=hardware.start_ns if start_ns is None else start_ns,
        failed=starts.failed if starts else 0,
        failed_at_ns=starts.failed_at_ns if starts else 0,
        decided_at_ns=decided.decided_at_ns if decided else 0,
        running_sum=reports[0],
        tokens_per_ks_sum=reports[1],
    )
