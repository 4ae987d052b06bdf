"""The leader's autoscaler: from demand and the state of the fleet to `ScaleDecided` events.

    the log → projection → Demand ┐
    RIFT_FLEET → Fleet → Replicas ┴→ decide (replay/scaling/policy.py) → ScaleDecided → RIFT_FLEET → driver
    the log → Arrivals → planned (replay/scaling/floor.py) → ScalePlanned → RIFT_FLEET → Fleet → the floor ↗

It looks every TICK_S at each model that has replicas or requests, and at once when a request arrives for a
model that is scaled to zero. It also declares silent replicas lost. The policy, and starting or ending a
replica, must not live here.
"""

import logging
from collections.abc import Mapping
from functools import partial

import anyio

from events import stream_fold, subjects
from events.fleet import Fleet
from events.log import Log, LogError
from events.publisher import Publisher
from events.schema import AnyEvent, ReplicaLost
from events.wakeup import Wakeup
from rift.control.duties.floor_planner import FloorPlanner
from rift.control.duties.replica_reports import ReplicaReports
from rift.control.duties.scaling_inputs import read_fleet, read_inputs
from rift.control.projection.warehouse_host import Projection
from rift.control.scaling_config import NOT_SERVED, ModelScaling

logger = logging.getLogger(__name__)

WRITER = "autoscaler"

# A start takes many times as long. One look costs some 25 ms of a core for a model with 100,000 requests in
# the last two hours.
TICK_S = 2.0

# An event that could not be stored is due again at the next look.
APPEND_S = 5.0


class Autoscaler:
    """Decides while it leads in `epoch`."""

    def __init__(
        self, log: Log, projection: Projection, scaling: Mapping[str, ModelScaling], *, epoch: int
    ) -> None:
        self._log = log
        self._publisher = Publisher(log, WRITER)
        self._projection = projection
        self._scaling = scaling
        self._epoch = epoch
        self._models = {subjects.slug(model): model for model in scaling}
        self._reports = ReplicaReports(log, Fleet())
        # Models to look at next, although they may have no replicas.
        self._requested: set[str] = set()
        self._request_came = Wakeup()
        self._fleet_changed = Wakeup()
        self._planner = FloorPlanner(projection)

    def request_accepted(self, slug: str) -> None:
        """Note that a request was accepted for the model of this slug."""
        model = self._models.get(slug)
        if model is not None and not self._fleet.wanted.get(model):
            self._requested.add(model)
            self._request_came.set()

    async def limits(self) -> Mapping[str, str]:
        """Return, by model, what keeps it from as many replicas as its requests need."""
        limits: dict[str, str] = {}
        for model, scaling in self._scaling.items():
            starts = self._fleet.starts.get(model)
            is_low = self._fleet.wanted.get(model, 0) < scaling.most
            plans = self._fleet.plans.get(model, ())
            if is_low and not (starts and starts.failed) and not (plans and plans[-1].is_missed):
                continue
            now_ns = self._reports.clock.now_ns()
            observation = await read_inputs(self._projection, self._fleet, model, scaling, now_ns=now_ns)
            if observation is not None and (limit := observation[0].limit()):
                limits[model] = limit
        return limits

    @property
    def _fleet(self) -> Fleet:
        return self._reports.fleet

    async def run(self) -> None:
        """Decide until cancelled, or until another process leads."""
        self._reports = ReplicaReports(self._log, await read_fleet(self._projection, self._epoch))
        after = self._reports.position
        async with (
            self._log.follow(subjects.FLEET, ["rift.fleet.>"], after=after) as reader,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(
                partial(stream_fold.drain, reader, self._reports, changed=self._fleet_changed.set)
            )
            self._requested.update(self._scaling)
            while self._fleet.epoch == self._epoch:
                request_came = self._request_came.pending
                for model in self._due():
                    await self._look(model)
                await self._declare_silent_lost()
                with anyio.move_on_after(TICK_S):
                    await request_came.wait()
            tasks.cancel_scope.cancel()

    def _due(self) -> list[str]:
        """Return the models to look at: those with replicas, wanted or live, and those with requests. An
        installation that scales no model starts its workers by hand, and nothing is decided."""
        if not self._scaling:
            return []
        fleet = self._fleet
        live = {model for model, replicas in fleet.replicas.items() if replicas}
        wanted = {model for model, replicas in fleet.wanted.items() if replicas}
        requested = self._requested
        self._requested = set()
        return sorted(model for model in live | wanted | requested if not self._is_settled(model))

    def _is_settled(self, model: str) -> bool:
        """Return whether nothing can be decided: the number is fixed, and already decided."""
        policy = self._scaling.get(model, NOT_SERVED).policy
        is_fixed = policy.replicas_min == policy.replicas_max
        return is_fixed and self._fleet.wanted.get(model, 0) == policy.replicas_max

    async def _look(self, model: str) -> None:
        """Decide on one model. If the inputs or the append fail, look again next time."""
        try:
            observation = await read_inputs(
                self._projection,
                self._fleet,
                model,
                self._scaling.get(model, NOT_SERVED),
                now_ns=self._reports.clock.now_ns(),
            )
            if observation is None:
                self._requested.add(model)
                return
            inputs, moment = observation
            plan = await self._planner.plan(self._fleet, model, inputs, moment, epoch=self._epoch)
            if plan is not None:
                logger.info("%s: the floor is %d, by %d requests", model, plan.floor, plan.requests)
                await self._publish(plan)
                # Decide with the new floor, at once.
                self._requested.add(model)
                self._request_came.set()
                return
            if (event := inputs.decided(model, moment, epoch=self._epoch)) is None:
                if inputs.demand.waiting:
                    self._requested.add(model)
                return
            logger.info("%s: %d → %d: %s", model, event.from_replicas, event.to_replicas, event.reason)
            await self._publish(event)
        except LogError as error:
            self._reports.note_outage()
            logger.warning("no decision on %s: %s", model, error)
            self._requested.add(model)

    async def _declare_silent_lost(self) -> None:
        if not (silent := self._reports.silent()):
            return
        try:
            if await self._log.last_sequence(subjects.FLEET) > self._fleet.position:
                # A report may be on its way.
                return
            for model, name, silent_s in silent:
                logger.warning("%s of %s has been silent for %d s", name, model, silent_s)
                why = f"silent for {silent_s} s"
                await self._publish(ReplicaLost(replica=name, model=model, why=why, cause="host"))
        except LogError as error:
            self._reports.note_outage()
            logger.warning("a silent replica is not declared lost yet: %s", error)

    async def _publish(self, event: AnyEvent) -> None:
        """Append, and wait until our own reader has passed the event: the next decision depends on it."""
        sequence = await self._publisher.publish(event, within_s=APPEND_S)
        while self._reports.position < sequence:
            await self._fleet_changed.wait()
