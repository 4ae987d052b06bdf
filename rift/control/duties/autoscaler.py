"""The leader's autoscaler: what is asked of each model, and how its fleet is, to `ScaleDecided`.

    the log → projection → Demand ┐
    RIFT_FLEET → Fleet → Replicas ┴→ decide (replay/scaling/policy.py) → ScaleDecided → RIFT_FLEET → driver

It looks once in a while at each model that has replicas or is asked for, and at once at a model without any
that is asked for. It also gives up replicas that fell silent. What must not live here: the policy, and
whatever starts or ends a replica.
"""

import logging
from collections.abc import Mapping
from typing import Any

import anyio
import msgspec

from events import codec, subjects
from events.fleet import Fleet
from events.log import Log, LogError, append_until_known
from events.schema import AnyEvent, ReplicaLost, ScaleDecided
from replay.scaling import demand_query
from replay.scaling.demand_query import Moment
from replay.scaling.hardware import Hardware
from replay.scaling.policy import POLICY, Policy
from replay.scaling.verify import Inputs, fleet_of
from replay.warehouse.result import QueryRefused
from rift.control.projection.warehouse_host import Projection

logger = logging.getLogger(__name__)

WRITER = "autoscaler"

# A start takes many times that, and a look costs some 25 ms of a core where a model had 100,000 requests in
# the last two hours.
TICK_S = 2.0

# Replicas report every 10 s. Three reports that did not come, and the time of one append.
SILENT_S = 35.0

# What could not be said is due again at the next look.
APPEND_S = 5.0

# A projection that is behind by an election has it in a moment.
AGAIN_S = 0.05


class ModelScaling(msgspec.Struct, frozen=True):
    """One model of this installation: what the operator says of it, and what one replica is."""

    policy: Policy
    hardware: Hardware


NOBODY = Policy(replicas_min=0, replicas_max=0)

# Of a model that nobody has measured: as slow as a large one. What replicas do corrects it.
UNKNOWN = Hardware(
    gpus=0,
    running_max=64,
    kv_tokens=1_000_000,
    prefill_tokens_per_s=5_000,
    step_us=20_000,
    step_us_per_running=1_000,
    start_ms=60_000,
    gpu_hour_nanousd=0,
    source="not measured: `rift calibrate` fits one",
)


class Autoscaler:
    """Decides while it leads in `epoch`."""

    def __init__(
        self, log: Log, projection: Projection, served: Mapping[str, ModelScaling], *, epoch: int
    ) -> None:
        self._log = log
        self._projection = projection
        self._served = served
        self._epoch = epoch
        self._models = {subjects.slug(model): model for model in served}
        self._fleet = Fleet()
        self._heard_at = 0.0
        # When each replica was heard, and since when we listen on one connection: by our own clock.
        self._heard: dict[str, float] = {}
        self._listens_at = 0.0
        self._listens_in = -1
        self._asked: set[str] = set()
        self._wake = anyio.Event()

    def asked(self, slug: str) -> None:
        """A request for the model of this slug was accepted."""
        model = self._models.get(slug)
        if model is not None and not self._fleet.wanted.get(model):
            self._asked.add(model)
            self._wake.set()

    async def run(self) -> None:
        """Decide until cancelled, or until another leads."""
        self._fleet = await self._read_fleet()
        after = self._fleet.position
        async with (
            self._log.follow(subjects.FLEET, ["rift.fleet.>"], after=after) as reader,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(self._follow, reader)
            self._asked.update(self._served)
            while self._fleet.epoch == self._epoch:
                for model in self._due():
                    await self._look(model)
                await self._give_up_silent()
                with anyio.move_on_after(TICK_S):
                    await self._wake.wait()
                self._wake = anyio.Event()
            tasks.cancel_scope.cancel()

    async def _read_fleet(self) -> Fleet:
        """Return the fleet once our own election is projected."""
        while True:
            try:
                fleet = await self._projection.read(fleet_of)
                if fleet.epoch >= self._epoch:
                    self._heard_at = anyio.current_time()
                    return fleet
            except QueryRefused as error:
                logger.warning("the fleet cannot be read: %s", error)
            await anyio.sleep(AGAIN_S)

    async def _follow(self, reader: Any) -> None:
        async for batch in reader:
            self._heard_at = anyio.current_time()
            for stored in batch:
                for event in self._fleet.fold(stored):
                    if (replica := getattr(event, "replica", None)) is not None:
                        self._heard[replica] = self._heard_at

    def _due(self) -> list[str]:
        """Return the models to look at: who has replicas, or shall have some, or is asked for. Where none is
        served, workers are started by hand, and nothing is decided."""
        if not self._served:
            return []
        fleet = self._fleet
        held = {model for model, replicas in fleet.replicas.items() if replicas}
        wanted = {model for model, replicas in fleet.wanted.items() if replicas}
        asked = self._asked
        self._asked = set()
        return sorted(model for model in held | wanted | asked if not self._is_settled(model))

    def _is_settled(self, model: str) -> bool:
        """Say whether nothing can be decided: the number is fixed, and holds."""
        served = self._served.get(model)
        policy = served.policy if served else NOBODY
        fixed = policy.replicas_min == policy.replicas_max
        return fixed and self._fleet.wanted.get(model, 0) == policy.replicas_max

    async def _look(self, model: str) -> None:
        """Decide on one model; what cannot be known or said now is due again at the next look."""
        try:
            if (found := await self._inputs(model)) is None:
                return
            inputs, moment = found
            if (decision := inputs.decide()) is None:
                if inputs.demand.waiting:
                    self._asked.add(model)
                return
            event = ScaleDecided(
                model=model,
                from_replicas=inputs.replicas.wanted,
                to_replicas=decision.to_replicas,
                reason=decision.reason,
                policy=POLICY,
                positions=dict(moment.positions),
                decided_at_ns=moment.now_ns,
                inputs=inputs.flat(),
                epoch=self._epoch,
            )
            logger.info("%s: %d → %d: %s", model, event.from_replicas, event.to_replicas, event.reason)
            await self._say(model, event)
        except (LogError, QueryRefused) as error:
            logger.warning("nothing was decided on %s: %s", model, error)
            self._asked.add(model)

    async def _inputs(self, model: str) -> tuple[Inputs, Moment] | None:
        """Return what a decision follows from, and as of when; None while the projection is behind."""
        served = self._served.get(model)
        policy, hardware = (served.policy, served.hardware) if served else (NOBODY, UNKNOWN)
        position = self._fleet.position
        replicas = demand_query.replicas(self._fleet, model, hardware)
        now_ns = self._now_ns()
        if not await self._projection.catch_up():
            # Work that is not seen must not be taken for none.
            logger.warning("nothing is decided on %s: the projection is behind the log", model)
            self._asked.add(model)
            return None
        positions = {**self._projection.applied}
        positions.pop(subjects.BOOK, None)
        if positions.get(subjects.FLEET, 0) < position:
            self._asked.add(model)
            return None
        positions[subjects.FLEET] = position
        at_ns = await self._projection.read(demand_query.stored_at_ns)
        moment = Moment(positions, max(now_ns, at_ns))
        demand, reports = await self._projection.read(
            lambda warehouse: demand_query.observed(warehouse.read, model, moment, idle_ns=policy.idle_ns)
        )
        replicas = msgspec.structs.replace(replicas, running_sum=reports[0], running_square_sum=reports[1])
        return Inputs(demand, replicas, policy, hardware), moment

    def _now_ns(self) -> int:
        """The broker's time, as far as its messages tell: never ahead of it."""
        return self._fleet.at_ns + int((anyio.current_time() - self._heard_at) * 1e9)

    async def _give_up_silent(self) -> None:
        """Say that replicas are lost that have not spoken for too long; nobody's silence is ours."""
        now = anyio.current_time()
        if not self._log.is_connected or self._listens_in != self._log.epoch:
            self._listens_at = now
            self._listens_in = self._log.epoch
        living = {name: model for model, replicas in self._fleet.replicas.items() for name in replicas}
        self._heard = {name: at for name, at in self._heard.items() if name in living}
        silent = [
            (model, name, int(silent_s))
            for name, model in living.items()
            if (silent_s := now - max(self._listens_at, self._heard.get(name, 0.0))) > SILENT_S
        ]
        if not silent:
            return
        try:
            if await self._log.last_sequence(subjects.FLEET) > self._fleet.position:
                return
            for model, name, seconds in silent:
                logger.warning("%s of %s has been silent for %d s", name, model, seconds)
                why = f"silent for {seconds} s"
                lost = ReplicaLost(replica=name, model=model, why=why, cause="host")
                await self._say(model, lost)
        except LogError as error:
            logger.warning("a silent replica is not given up yet: %s", error)

    async def _say(self, model: str, event: AnyEvent) -> None:
        """Append, and wait until our own reader has passed it: what is said next follows from it."""
        data = codec.encode(WRITER, [event])
        subject = subjects.fleet(subjects.slug(model))
        sequence = await append_until_known(self._log, subjects.FLEET, subject, data, within_s=APPEND_S)
        while self._fleet.position < sequence:  # noqa: ASYNC110  # the reader's turn
            await anyio.sleep(0.005)
