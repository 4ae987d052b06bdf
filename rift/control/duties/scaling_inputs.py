"""The inputs of a scaling decision, read from the projection."""

import logging

import anyio
import msgspec

from events import subjects
from events.fleet import Fleet
from replay.scaling import demand_query, floor
from replay.scaling.demand_query import Moment
from replay.scaling.verify import Inputs, fleet_of
from replay.warehouse.result import QueryRefused
from replay.warehouse.warehouse import Warehouse
from rift.control.projection.warehouse_host import Projection
from rift.control.scaling_config import ModelScaling
from rift.rpc import ProjectionBlocked

logger = logging.getLogger(__name__)

# The projection usually lacks the leader's own election for a moment.
ELECTION_RETRY_S = 0.05
# The projection logs once that its disk refuses writes.
BLOCKED_RETRY_S = 1.0


async def read_fleet(projection: Projection, epoch: int) -> Fleet:
    """Return the fleet once the projection has applied the election of `epoch`."""
    while True:
        try:
            fleet = await projection.read(fleet_of)
            if fleet.epoch >= epoch:
                return fleet
        except ProjectionBlocked:
            await anyio.sleep(BLOCKED_RETRY_S)
        except QueryRefused as error:
            logger.warning("the fleet cannot be read: %s", error)
        await anyio.sleep(ELECTION_RETRY_S)


async def read_inputs(
    projection: Projection, fleet: Fleet, model: str, scaling: ModelScaling, *, now_ns: int
) -> tuple[Inputs, Moment] | None:
    """Return the inputs of a decision and the moment they describe; None if the projection is behind."""
    fleet_position = fleet.position
    plans = fleet.plans.get(model, ())
    replicas = demand_query.replicas(fleet, model, scaling.hardware)
    if not await projection.catch_up():
        # A shard that is not applied yet may hold requests: its model must not look idle.
        if projection.problem is None:
            logger.warning("no decision on %s: the projection is behind the log", model)
        return None
    positions = {stream: projection.applied.get(stream, 0) for stream in projection.streams}
    positions.pop(subjects.BOOK, None)
    if positions.get(subjects.FLEET, 0) < fleet_position:
        return None
    positions[subjects.FLEET] = fleet_position

    def observe(warehouse: Warehouse) -> tuple[Inputs, Moment]:
        moment = Moment(positions, max(now_ns, demand_query.stored_at_ns(warehouse)))
        hardware, idle_ns = scaling.hardware, scaling.policy.idle_ns
        demand, reports = demand_query.observed(warehouse.read, model, moment, hardware, idle_ns=idle_ns)
        reported = msgspec.structs.replace(replicas, running_sum=reports[0], tokens_per_ks_sum=reports[1])
        held = floor.held(plans, moment.now_ns)
        return Inputs(demand, reported, scaling.policy, scaling.hardware, held), moment

    try:
        return await projection.read(observe, catch_up=False)
    except ProjectionBlocked:
        return None
    except QueryRefused as error:
        logger.warning("no decision on %s: %s", model, error)
        return None
