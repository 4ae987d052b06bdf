"""A worker's share of one shard: it takes jobs, runs an attempt at each, and releases what it cannot finish.

The life of a job here:

    1. A delivery arrives for a free slot. If the worker's reader has seen no activity on its request, the
       request is fresh. Otherwise its history is read.
    2. `AttemptStarted` is sent before the engine sees the prompt, and durable unless the request is fresh.
    3. The attempt generates; the lane's writer appends its events.
    4. `claims.py` reads them back, in log order with the events of other processes, and decides which count.

So it is harmless that a worker begins a fresh request before its reader has seen its own `AttemptStarted`: if
another attempt counts, none of this one's events do.

A request that kills engines must not do so for ever, so each death has to be counted. What the operating
system has accepted outlives this process, so the engine of a fresh request need not wait for the disk. If the
acknowledgement fails to come, the engine's request is aborted, and the job is delivered again; then it is not
fresh. The lane's writer appends nothing of the answer before the acknowledgement.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import anyio
import msgspec
from anyio.abc import TaskGroup

from events import ids
from events.contracts import HANG_PER_PROMPT_TOKEN_S, HANG_S, IN_PROGRESS_S, SECOND_NS
from events.encryption import opened
from events.log import Job, Log, LogError
from events.schema import AttemptReleased, AttemptStarted, Problem
from rift.engines import Engine, EngineFailed, InvalidRequest
from rift.worker.attempt import Attempt, NotContinuable
from rift.worker.claims import Claims, JobClaim, open_claims
from rift.worker.isolation import POISON, is_poison, is_suspect
from rift.worker.lane_writer import AttemptWriter, LaneWriter, SealedWriter
from rift.worker.prompt import PreparedRequest, prepare_or_refuse
from rift.worker.slots import Place, Slots

logger = logging.getLogger(__name__)

# The limit for `_release`, which waits for the broker's answer to one last record. `rift up` and Kubernetes
# wait longer before they kill the process.
RELEASE_S = 4.0

# How often a draining worker checks whether its deadline was shortened.
DRAIN_CHECK_S = 0.2

# A suspect that we give back is delivered again after this time. We run another one alone, and a worker that
# is free may take it; without a delay it would only come back here.
SUSPECT_DELAY_S = 1.0


class WorkerConfig(msgspec.Struct, frozen=True):
    """`model` is a slug, `slots` the replica's, and `entropy` returns random bytes."""

    name: str
    model: str
    shard: int
    slots: Slots
    entropy: Callable[[int], bytes]


class Worker:
    """Runs attempts at the jobs of one shard. `open_worker` constructs it; `run` serves."""

    def __init__(
        self,
        log: Log,
        engine: Engine,
        config: WorkerConfig,
        claims: Claims,
        tasks: TaskGroup,
    ) -> None:
        self.claims = claims
        self._log = log
        self._engine = engine
        self.shard = config.shard
        self._config = config
        self._tasks = tasks
        self._slots = config.slots
        self._writers: dict[str, LaneWriter] = {}
        self._progressed_at_s = anyio.current_time()

    async def run(self) -> None:
        """Serve until the shutdown; finish what ends in time, and release the rest.

        Raises EngineFailed, LogError.
        """
        self._tasks.start_soon(self._fetch)
        self._tasks.start_soon(self._watch_engine)
        await self._slots.shutdown.wait()
        self._slots.ask()
        for claim in self.claims.held:
            # Giving one back waits for the broker; another may have ended meanwhile.
            if claim.attempt is None and self.claims.holds(claim):
                await self.claims.give_back(claim)
        while self.claims.held and anyio.current_time() < self._slots.shutdown.deadline_s:
            with anyio.move_on_after(DRAIN_CHECK_S):
                await self.claims.advanced.wait()
        with anyio.move_on_after(RELEASE_S):
            await self._release()

    # --- jobs ----------------------------------------------------------------------------------------

    async def _fetch(self) -> None:
        self._slots.add(self.claims.jobs)
        async for job in self.claims.jobs:
            place = self._slots.take(len(job.stored.data))
            self._slots.counts.claim(job.deliveries)
            self._tasks.start_soon(self._handle, job, place)

    async def _handle(self, job: Job, place: Place) -> None:
        try:
            await self._admit(job, place)
        except LogError as error:
            # The job is delivered again; by then the log may answer.
            logger.warning("delivery %d: %s", job.stored.sequence, error)
            self.claims.drop_job(job)
        finally:
            self._slots.give_back(place)

    async def _admit(self, job: Job, place: Place) -> None:
        """Claim a job, and run it with others, alone, or not at all. Raises LogError."""
        if (claim := self.claims.take(job)) is None:
            return
        if self._slots.shutdown.is_requested:
            await self.claims.give_back(claim)
            return
        if not await self.claims.catch_up(claim):
            return
        if not is_suspect(claim.history.life):
            async with self._slots.isolation.shared():
                await self._run_attempt(claim, place)
        elif self._slots.isolation.is_requested:
            # One suspect at a time: meanwhile this one may run alone elsewhere.
            await self.claims.give_back(claim, delay_s=SUSPECT_DELAY_S)
        else:
            self._slots.isolation.request()
            self._slots.ask()
            async with self._slots.isolation.alone():
                await self._run_attempt(claim, place)

    async def _run_attempt(self, claim: JobClaim, place: Place) -> None:
        if not self.claims.holds(claim):
            return
        accepted, cipher = await opened(self._log, claim.accepted)
        prepared = await prepare_or_refuse(self._engine, accepted)
        if not self.claims.holds(claim):
            return
        history = claim.history
        started = AttemptStarted(
            request=accepted.request,
            attempt=ids.new_attempt_id(self._config.entropy(ids.RANDOM_BYTES)),
            after=history.life.attempt,
            resume_index=history.life.next_index,
            worker=self._config.name,
            prompt_tokens=len(prepared.prompt_ids),
            accepted_at_ns=claim.accepted_at_ns,
            engine=self._engine.name,
            simulated=self._engine.simulated,
            model_digest=self._engine.model_digest,
            delivery=claim.acks[0],
        )
        lane_writer = self._writer(claim)
        writer = lane_writer if cipher is None else SealedWriter(lane_writer, cipher)
        attempt = claim.attempt = Attempt(prepared, started, engine=self._engine, writer=writer)
        self._slots.begin(place, attempt)
        with self._slots.counts.attempt(attempt):
            await self._answer(claim, attempt, prepared, started, writer)

    async def _answer(
        self,
        claim: JobClaim,
        attempt: Attempt,
        prepared: PreparedRequest,
        started: AttemptStarted,
        writer: AttemptWriter,
    ) -> None:
        history = claim.history
        if prepared.refusal is not None:
            attempt.refuse(*prepared.refusal)
            return
        if is_poison(history.life):
            attempt.refuse("poison", POISON)
            return
        # A fresh request has no rival that we know of, so its engine starts at once. If another attempt
        # counts, the reader drops this claim and stops the attempt.
        is_fresh = not history.counted
        receipt = writer.put_tracked(started, partial(self._withdraw, claim) if is_fresh else None)
        if not receipt.sent.is_set():
            await receipt.sent.wait()
        if not is_fresh or self._log.has_unsent:
            await self.claims.has_counted(claim, await receipt.stored())
        if not self.claims.holds(claim):
            return
        waited_s = max(0.0, (self.claims.clock.now_ns() - claim.accepted_at_ns) / SECOND_NS)
        try:
            attempt.resume(history)
            self._slots.counts.prompt_tokens += attempt.prompt_tokens
            await attempt.run(prepared.accepted.deadline_ms / 1000 - waited_s)
        except NotContinuable as error:
            attempt.finish("failed", Problem(code="not_continuable", message=str(error)))
        except InvalidRequest as error:
            attempt.finish("invalid", Problem(code=error.code, message=error.message, param=error.param))
        self._progressed_at_s = anyio.current_time()

    def _withdraw(self, claim: JobClaim) -> None:
        """Abort an attempt whose start may be lost: nobody would count it if its engine died."""
        attempt = claim.attempt
        if self.claims.holds(claim) and attempt is not None and not attempt.finished:
            self.claims.drop(claim)
            # Without them, answers that cannot be continued can be tried again.
            self._writer(claim).discard(attempt.id)
            self._tasks.start_soon(self._give_back_released, claim, attempt.id)

    async def _give_back_released(self, claim: JobClaim, attempt: str) -> None:
        """Release an attempt and have its job delivered again."""
        # Stored before its job is given back: the next worker must find the release.
        await self._writer(claim).put_tracked(AttemptReleased(attempt=attempt, why="host")).stored()
        try:
            for ack in claim.acks:
                await self._log.give_back(ack)
        except LogError as error:
            logger.warning("%s is delivered again later: %s", claim.request.text, error)

    def _writer(self, claim: JobClaim) -> LaneWriter:
        at = claim.request.at
        if (writer := self._writers.get(at.lane)) is None:
            blocked = partial(self._abandon_lane, at.lane)
            writer = LaneWriter(self._log, at, name=self._config.name, blocked=blocked)
            self._writers[at.lane] = writer
            self._tasks.start_soon(writer.run)
        return writer

    def flush(self) -> None:
        """Append what a step of the engine has added to each lane."""
        for writer in self._writers.values():
            writer.flush()

    # --- keeping and releasing -----------------------------------------------------------------------

    async def _watch_engine(self) -> None:
        """Keep our jobs for as long as the engine makes progress. Raises EngineFailed when it hangs."""
        while True:
            await anyio.sleep(IN_PROGRESS_S)
            attempts = [claim.attempt for claim in self.claims.held if claim.attempt is not None]
            progressed_at_s = max([self._progressed_at_s, *(attempt.progressed_at_s for attempt in attempts)])
            silent_s = anyio.current_time() - progressed_at_s
            prompt_tokens = sum(attempt.prompt_tokens for attempt in attempts)
            is_working = any(not attempt.finished for attempt in attempts)
            if is_working and silent_s > HANG_S + HANG_PER_PROMPT_TOKEN_S * prompt_tokens:
                raise EngineFailed(f"the engine hangs: its last step was {silent_s:.0f} s ago")
            await self.claims.keep_alive()

    def _abandon_lane(self, lane: str) -> None:
        """Stop generating for a lane to which nothing can be appended. Its jobs are delivered again later."""
        for claim in self.claims.held:
            if claim.request.at.lane == lane and claim.attempt is not None:
                self.claims.drop(claim)
                if not claim.attempt.finished:
                    # Queued after the tokens; once stored, it shows that the engine did not die.
                    self._writer(claim).put(AttemptReleased(attempt=claim.attempt.id, why="host"))

    async def _release(self) -> None:
        """Release every running attempt, so that another worker continues it at once, and wait until the
        ends of the others are acknowledged."""
        acks = []
        for claim in self.claims.held:
            attempt = claim.attempt
            if attempt is not None and not attempt.finished:
                acks += claim.acks
                attempt.stop(None)
                self._writer(claim).put(AttemptReleased(attempt=attempt.id, why="draining"))
        # Stored before its job is given back: the next worker must find the release.
        for writer in self._writers.values():
            await writer.flushed()
        for ack in acks:
            await self._log.give_back(ack)
        while any(claim.attempt and claim.attempt.finished for claim in self.claims.held):
            await self.claims.advanced.wait()


@asynccontextmanager
async def open_worker(log: Log, engine: Engine, config: WorkerConfig) -> AsyncIterator[Worker]:
    """Open a worker, whose reader runs while the context lasts. Raises EngineFailed, LogError."""
    async with open_claims(log, config.shard, config.model) as claims, anyio.create_task_group() as tasks:
        worker = Worker(log, engine, config, claims, tasks)
        engine.after_step.append(worker.flush)
        try:
            yield worker
        finally:
            engine.after_step.remove(worker.flush)
            tasks.cancel_scope.cancel()
