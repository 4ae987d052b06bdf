"""A worker's share of one shard: takes jobs, keeps them while it works, and lets go of them.

The life of a job here:

    1. A delivery comes for a free slot. If the worker's reader, which has seen everything of its model
       since it opened, knows of nobody who touched the request, it is fresh; else its history is read.
    2. `AttemptStarted` is appended and durable before the engine sees the prompt.
    3. The attempt generates; the lane's writer appends what it says.
    4. The reader folds the request's events, ours among them, in log order. It alone decides: who is
       superseded goes silent, who is asked to cancel ends, and a job is acknowledged only once the
       reader has seen its request ended.

So the worker may be wrong about everything until the reader has passed it, and harm nobody.
"""

import logging
from collections.abc import Callable
from functools import partial

import anyio
from anyio.abc import TaskGroup

from events import codec, ids, subjects
from events.encryption import opened
from events.ids import RequestId
from events.lifecycle import NEW, Life, advance, cancelled_as, deaths
from events.log import Follower, Job, Jobs, Log, LogError
from events.request_history import HistoryReader
from events.request_states import RequestStates
from events.schema import (
    AttemptReleased,
    AttemptStarted,
    CancelRequested,
    Problem,
    RequestAccepted,
    RequestFinished,
)
from rift.engines import Engine, EngineFailed, Invalid
from rift.worker.attempt import Attempt, NotContinuable, prepare_or_refuse
from rift.worker.claims import Claim, Claimed, Load, SeenRequests, is_against, load, open_job, takes_away
from rift.worker.isolation import DEATHS_MAX, POISON, Isolation, is_suspect
from rift.worker.lane_writer import LaneWriter, sealed
from rift.worker.shutdown import Shutdown

logger = logging.getLogger(__name__)

# Three in-progress answers fit into the broker's ack_wait of 5 s.
KEEP_S = 1.5

# An engine that says nothing for so long is dead. A prompt is silent work: the slowest machine that
# was measured reads 200 tokens a second, and this allows a quarter of that.
HANG_S = 30.0
HANG_PER_PROMPT_TOKEN_S = 0.02

# What draining may take: the broker's answer to one last record, and the supervisor's patience is 10 s.
DRAIN_S = 4.0

# How soon a worker that leaves looks whether it was told to hurry.
LEAVING_S = 0.2

# A suspect that cannot run now may run alone elsewhere; who asks again sooner only asks more often.
SUSPECT_DELAY_S = 1.0

# A live attempt that said something so recently lives: its job came again by mistake. (Who died was
# silent for at least 3.5 s before its job comes again: ack_wait, less one in-progress answer.)
MOVING_NS = 3_000_000_000

NANOSECONDS = 1_000_000_000


class Worker:
    def __init__(
        self,
        log: Log,
        engine: Engine,
        *,
        name: str,
        model: str,
        shard: int,
        slots: int,
        entropy: Callable[[int], bytes],
    ) -> None:
        self._log = log
        self._engine = engine
        self._name = name
        self._model = model
        self._shard = shard
        self._slots = slots
        self._entropy = entropy
        self._histories = HistoryReader(log)
        self._lives = RequestStates()
        self._held: dict[str, Claim] = {}
        self._buffers: dict[str, list[tuple[int, object, subjects.Address]]] = {}
        self._writers: dict[str, LaneWriter] = {}
        self._running = 0
        self._solo = Isolation()
        self._read_to = anyio.Event()
        self._read_position = 0
        self._now_ns = 0
        self._now_at = anyio.current_time()
        self._moved_at = 0.0
        self._tasks: TaskGroup
        self._leaving: Shutdown
        self._touched: SeenRequests
        self._jobs: Jobs
        self._reader: Follower

    @property
    def load(self) -> Load:
        return load(self._held.values())

    async def run(self, *, opened: Callable[[], None], leaving: Shutdown) -> None:
        """Serve until told to leave; finish what ends in time, and let go of the rest.

        Raises EngineFailed, LogError.
        """
        self._leaving = leaving
        stream = subjects.shard_stream(self._shard)
        opened_at = await self._log.last_sequence(stream)
        self._touched = SeenRequests(opened_at)
        topics = subjects.of_model(self._shard, self._model)
        async with (
            self._log.follow(stream, topics, after=opened_at) as self._reader,
            self._log.jobs(self._shard, self._model) as self._jobs,
            anyio.create_task_group() as self._tasks,
        ):
            self._tasks.start_soon(self._read)
            self._tasks.start_soon(self._keep)
            self._tasks.start_soon(self._fetch)
            opened()
            await leaving.wait()
            self._want()
            await self._give_back_unbegun()
            while self._held and anyio.current_time() < leaving.until:
                with anyio.move_on_after(LEAVING_S):
                    await self._read_to.wait()
            with anyio.move_on_after(DRAIN_S):
                await self._let_go()
            self._tasks.cancel_scope.cancel()

    # --- taking ------------------------------------------------------------------------------------

    async def _fetch(self) -> None:
        self._want()
        async for job in self._jobs:
            self._running += 1
            self._tasks.start_soon(self._serve, job)

    def _want(self) -> None:
        is_full = self._solo.is_wanted or self._leaving.is_told
        self._jobs.want(0 if is_full else self._slots - self._running)

    async def _serve(self, job: Job) -> None:
        try:
            await self._work(job)
        except LogError as error:
            # The delivery comes again; by then the log may answer.
            logger.warning("delivery %d: %s", job.stored.sequence, error)
            self._drop_job(job)
        finally:
            self._running -= 1
            self._want()

    async def _work(self, job: Job) -> None:
        opened = open_job(job)
        if opened is None:
            return
        accepted, request = opened
        if (held := self._held.get(request.text)) is not None:
            held.acks.append(job.ack)
            return
        if self._leaving.is_told:
            await self._log.give_back(job.ack)
            return
        held = self._held[request.text] = Claim(accepted, request.at, [job.ack])
        taken = await self._take(accepted, request)
        if taken is None or self._held.get(request.text) is not held:
            return
        if not is_suspect(taken.life):
            async with self._solo.beside_others():
                await self._attempt(job, held, taken)
        elif self._solo.is_wanted:
            # One suspect at a time: this one may run alone elsewhere meanwhile.
            for ack in self._drop(request.text).acks:
                await self._log.give_back(ack, delay_s=SUSPECT_DELAY_S)
        else:
            self._solo.announce()
            self._want()
            async with self._solo.alone():
                await self._attempt(job, held, taken)

    async def _take(self, accepted: RequestAccepted, request: RequestId) -> Claimed | None:
        """Learn where the request stands and follow it; None if it has ended, or still moves."""
        if not self._touched.may_have(request):
            life = advance(NEW, accepted)
            self._lives.follow(request.text, life)
            return Claimed(life)
        self._buffers[request.text] = []
        try:
            past = await self._histories.read(request)
        finally:
            buffered = self._buffers.pop(request.text)
        if request.text not in self._held:
            return None
        if past.accepted is None or past.life.phase == "ended":
            # What has no acceptance any more was trimmed, and so has ended.
            await self._let_end(request.text)
            return None
        if past.life.live and self._time_ns() - past.counted[-1].stored_at_ns < MOVING_NS:
            self._drop(request.text)
            return None
        self._lives.follow(request.text, past.life)
        for sequence, event, at in buffered:
            if sequence > past.position:
                self._lives.fold(event, at)
        if self._lives[request.text].counted != past.life.counted:
            self._drop(request.text)
            return None
        return Claimed(self._lives[request.text], past)

    async def _attempt(self, job: Job, held: Claim, taken: Claimed) -> None:
        if self._held.get(held.accepted.request) is not held:
            return
        accepted, seal = await opened(self._log, held.accepted)
        prompt, refusal = await prepare_or_refuse(self._engine, accepted)
        if self._held.get(accepted.request) is not held:
            return
        # A delivery may be of a repeated acceptance; the past knows the first.
        accepted_at_ns = taken.past.counted[0].stored_at_ns if taken.past else job.stored.stored_at_ns
        started = AttemptStarted(
            request=accepted.request,
            attempt=ids.new_attempt_id(self._entropy(ids.RANDOM_BYTES)),
            after=taken.life.attempt,
            resume_index=taken.life.next_index,
            worker=self._name,
            prompt_tokens=len(prompt.ids),
            accepted_at_ns=accepted_at_ns,
            engine=self._engine.name,
            simulated=self._engine.simulated,
            model_digest=self._engine.model_digest,
            delivery=job.ack,
        )
        writer = sealed(self._writer(held.at), seal)
        attempt = held.attempt = Attempt(accepted, started, prompt, engine=self._engine, writer=writer)
        held.prompt_tokens = len(prompt.ids)
        if refusal is not None:
            attempt.refuse(*refusal)
            return
        if deaths(taken.life) >= DEATHS_MAX:
            attempt.refuse("poison", POISON)
            return
        position = await writer.put_durably(started)
        if taken.past is not None and not await self._counts(held, position):
            return
        waited_s = max(0.0, (self._time_ns() - accepted_at_ns) / NANOSECONDS)
        try:
            if taken.past is not None:
                attempt.resume(taken.past)
            await attempt.run(accepted.deadline_ms / 1000 - waited_s)
        except NotContinuable as error:
            attempt.finish("failed", Problem(code="not_continuable", message=str(error)))
        except Invalid as error:
            attempt.finish("invalid", Problem(code=error.code, message=error.message, param=error.param))
        self._moved_at = anyio.current_time()

    def _time_ns(self) -> int:
        """The broker's time, as far as what was read tells: never ahead of it."""
        return self._now_ns + int((anyio.current_time() - self._now_at) * NANOSECONDS)

    async def _counts(self, held: Claim, position: int) -> bool:
        """Wait until the reader has passed our start; say whether it counts."""
        while self._read_position < position:
            await self._read_to.wait()
        return self._held.get(held.accepted.request) is held

    def _writer(self, at: subjects.Address) -> LaneWriter:
        if (writer := self._writers.get(at.lane)) is None:
            stream = subjects.shard_stream(self._shard)
            writer = self._writers[at.lane] = LaneWriter(
                self._log,
                stream,
                subjects.work(at),
                name=self._name,
                blocked=partial(self._go_silent, at.lane),
            )
            self._tasks.start_soon(writer.run)
        return writer

    # --- reading -----------------------------------------------------------------------------------

    async def _read(self) -> None:
        async for batch in self._reader:
            for stored in batch:
                if stored.stored_at_ns > self._now_ns:
                    self._now_ns = stored.stored_at_ns
                    self._now_at = anyio.current_time()
                at = subjects.parse(stored.subject)
                assert at is not None, "the reader's subjects are those of requests"
                _, events = codec.decode(stored.data)
                for buffer in self._buffers.values():
                    buffer += [(stored.sequence, event, at) for event in events]
                for event in events:
                    await self._see(event, at)
            self._read_position = batch[-1].sequence
            read_to = self._read_to
            self._read_to = anyio.Event()
            read_to.set()

    async def _see(self, event: object, at: subjects.Address) -> None:
        request = self._lives.request_of(event)
        if request is None:
            return
        if request not in self._lives:
            if isinstance(event, AttemptStarted | CancelRequested | RequestFinished):
                self._touch(request)
            return
        counted = self._lives.fold(event, at)
        if counted is not None:
            await self._obey(request, event, counted[1])
        elif is_against(event, self._held[request].attempt, self._lives[request]):
            self._drop(request)

    async def _obey(self, request: str, event: object, life: Life) -> None:
        attempt = self._held[request].attempt
        if life.phase == "ended":
            await self._let_end(request)
        elif takes_away(event, attempt):
            self._drop(request)
        elif life.wanted is not None and attempt is not None and life.attempt == attempt.id:
            attempt.stop(cancelled_as(life.wanted))

    async def _let_end(self, request: str) -> None:
        """The reader has seen the request ended: nobody needs its job any more."""
        held = self._drop(request)
        for ack in held.acks:
            await self._log.ack(ack)

    def _drop_job(self, job: Job) -> None:
        for request, held in list(self._held.items()):
            if job.ack in held.acks:
                self._drop(request)

    def _drop(self, request: str) -> Claim:
        """Go silent: no acknowledgement, no return. What is not ended will be delivered again."""
        held = self._held.pop(request)
        if held.attempt is not None:
            held.attempt.stop(None)
        self._lives.forget(request)
        self._touch(request)
        return held

    def _touch(self, request: str) -> None:
        self._touched.add(request, position=self._reader.position, now_ns=self._now_ns)

    # --- keeping -----------------------------------------------------------------------------------

    async def _keep(self) -> None:
        """Hold our jobs while the engine moves. Raises EngineFailed once it does not."""
        self._moved_at = anyio.current_time()
        while True:
            await anyio.sleep(KEEP_S)
            self._touched.forget_old(self._now_ns)
            now = anyio.current_time()
            attempts = [held.attempt for held in self._held.values() if held.attempt is not None]
            working = [attempt for attempt in attempts if not attempt.finished]
            silent_tokens = sum(held.prompt_tokens for held in self._held.values())
            moved_at = max([self._moved_at, *(attempt.progressed_at for attempt in attempts)])
            if working and now - moved_at > HANG_S + HANG_PER_PROMPT_TOKEN_S * silent_tokens:
                raise EngineFailed(f"the engine said nothing for {now - moved_at:.0f} s")
            for held in list(self._held.values()):
                for ack in held.acks:
                    await self._log.in_progress(ack)

    def _go_silent(self, lane: str) -> None:
        """The lane's log takes nothing: generate nothing. The deliveries come again once it does."""
        for request, held in list(self._held.items()):
            if held.at.lane == lane and held.attempt is not None:
                attempt = self._drop(request).attempt
                assert attempt is not None, "it had one"
                if not attempt.finished:
                    # Behind all it said: when the log takes it, nobody thinks that the engine died.
                    self._writer(held.at).put(AttemptReleased(attempt=attempt.id, why="host"))

    async def _give_back_unbegun(self) -> None:
        """What is not begun must not begin while we go."""
        for request, held in list(self._held.items()):
            if held.attempt is None:
                for ack in self._drop(request).acks:
                    await self._log.give_back(ack)

    async def _let_go(self) -> None:
        """Release every attempt, so that another worker continues it at once."""
        released = []
        for held in list(self._held.values()):
            attempt = held.attempt
            if attempt is not None and not attempt.finished:
                released += held.acks
                attempt.stop(None)
                self._writer(held.at).put(AttemptReleased(attempt=attempt.id, why="draining"))
        for writer in self._writers.values():
            await writer.flushed()
        for ack in released:
            await self._log.give_back(ack)
        while any(held.attempt and held.attempt.finished for held in self._held.values()):
            await self._read_to.wait()
