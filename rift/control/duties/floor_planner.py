"""The plans of the models' floors: a replay of the recent past, every PLAN_NS, off the event loop."""

import logging

import anyio
import msgspec
from anyio import to_thread

from events import subjects
from events.fleet import Fleet
from events.schema import ScalePlanned
from replay.scaling import floor
from replay.scaling.arrivals import SLOT_NS, Arrivals
from replay.scaling.demand_query import Moment, arrivals
from replay.scaling.policy import POLICY
from replay.scaling.verify import Inputs
from replay.warehouse.result import QueryRefused
from replay.warehouse.warehouse import Warehouse
from rift.control.projection.warehouse_host import Projection
from rift.rpc import ProjectionBlocked

logger = logging.getLogger(__name__)


class FloorPlanner:
    """Plans each model when it is due, by this process's clock."""

    def __init__(self, projection: Projection) -> None:
        self._projection = projection
        self._due_at: dict[str, float] = {}

    async def plan(
        self, fleet: Fleet, model: str, inputs: Inputs, moment: Moment, *, epoch: int
    ) -> ScalePlanned | None:
        """Return the plan as of `moment`, if one is due and differs from the last."""
        now = anyio.current_time()
        policy, hardware = inputs.policy, inputs.hardware
        if now < self._due_at.get(model, 0) or not floor.has_floor(policy, hardware):
            return None
        plans = fleet.plans.get(model, ())
        terms = floor.terms_of(inputs.demand, inputs.replicas, policy, hardware, plans)

        def read(warehouse: Warehouse) -> Arrivals:
            longest = floor.too_long(policy.ttft_ms, hardware)
            return arrivals(warehouse.read, model, moment, long_tokens=longest)

        try:
            past = await self._projection.read(read, catch_up=False)
        except ProjectionBlocked:
            return None
        except QueryRefused as error:
            logger.warning("no plan for %s: %s", model, error)
            return None
        self._due_at[model] = now + floor.PLAN_NS / 1e9
        plan = await to_thread.run_sync(floor.planned, past, terms)
        if not floor.is_new(plan, plans, POLICY):
            return None
        positions, shard_positions = subjects.unnamed(moment.positions)
        return ScalePlanned(
            model=model,
            floor=plan.replicas,
            restart=plan.restart,
            policy=POLICY,
            positions=positions,
            shard_positions=shard_positions,
            from_ns=past.slots[0].at * SLOT_NS if past.slots else moment.now_ns,
            planned_at_ns=moment.now_ns,
            requests=plan.counted,
            sha256=await to_thread.run_sync(floor.digest, past, terms),
            inputs=msgspec.structs.asdict(terms),
            candidates=plan.candidates,
            restarts=plan.restarts,
            is_missed=plan.is_missed,
            epoch=epoch,
        )
