"""The jobs that a worker holds, and the reader that decides about them.

The reader folds every event of the model on its shard in log order, our own events included. Only the reader
decides: it silently drops a claim whose attempt was superseded, stops a cancelled attempt, and acknowledges a
job once its request has ended in the log.

Nearly all that it reads, this worker wrote, so it reads every READ_PACE_S. A second, live reader sees only
cancels, and hurries the first.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import msgspec

from events import codec, subjects
from events.broker_clock import BrokerClock
from events.contracts import ATTEMPT_ALIVE_S, SECOND_NS
from events.ids import RequestId, parse_request_id
from events.lifecycle import NEW, Life, advance, cancelled_as
from events.log import Follower, Job, Jobs, Log
from events.request_history import HistoryReader, RequestHistory
from events.request_states import RequestStates
from events.schema import AttemptReleased, AttemptStarted, CancelRequested, RequestAccepted, RequestFinished
from events.wakeup import Wakeup
from rift.worker.attempt import Attempt

logger = logging.getLogger(__name__)

# A worker notices this late that it was superseded: well below the second or two that another worker needs to
# take over, and rare compared with the records of a busy engine.
READ_PACE_S = 0.25

# Activity on a request is remembered this long. The history of an older request is read from the log.
REMEMBERED_NS = 600 * SECOND_NS


class JobClaim(msgspec.Struct):
    """A job that this worker holds: its request, the deliveries to answer, and its attempt once it has begun.

    `history` is empty, but for the life, while no earlier attempt is known. `is_repeated`: the broker has
    delivered the job before, perhaps to a worker whose events our reader has not reached.
    """

    request: RequestId
    accepted: RequestAccepted
    accepted_at_ns: int
    acks: list[str]
    history: RequestHistory
    is_repeated: bool = False
    attempt: Attempt | None = None


class Load(msgspec.Struct, frozen=True):
    """Requests in the engine, claimed jobs that have not begun, and the tokens that the engine holds."""

    running: int = 0
    waiting: int = 0
    tokens: int = 0

    def __add__(self, other: "Load") -> "Load":
        return Load(self.running + other.running, self.waiting + other.waiting, self.tokens + other.tokens)


class SeenRequests:
    """The requests with an event other than their acceptance after `known_from`.

    Each has the position and stored time of its last such event.
    """

    def __init__(self, known_from: int) -> None:
        self._known_from = known_from
        self._last: dict[str, tuple[int, int]] = {}

    def add(self, request: str, *, position: int, now_ns: int) -> None:
        self._last.pop(request, None)
        self._last[request] = position, now_ns

    def may_include(self, request: RequestId) -> bool:
        """Return False only if the request is certainly fresh.

        The delivery's own position proves nothing, because an acceptance may be stored twice. But no event of
        a request is stored before its floor.
        """
        return request.text in self._last or request.floor < self._known_from

    def forget_old(self, now_ns: int) -> None:
        """Forget entries older than REMEMBERED_NS. `add` keeps the oldest entry first."""
        oldest_ns = now_ns - REMEMBERED_NS
        while self._last and self._last[oldest := next(iter(self._last))][1] < oldest_ns:
            self._known_from = max(self._known_from, self._last.pop(oldest)[0])


class Claims:
    """Takes jobs, follows their requests, and answers their deliveries.

    `jobs` brings the deliveries, `clock` is the broker's time as far as it was read, and `advanced` wakes
    after each batch.
    """

    def __init__(self, log: Log, reader: Follower, jobs: Jobs, *, known_from: int) -> None:
        self.jobs = jobs
        self.clock = BrokerClock()
        self.advanced = Wakeup()
        self._log = log
        self._reader = reader
        self._histories = HistoryReader(log)
        self._states = RequestStates()
        self._seen = SeenRequests(known_from)
        self._held: dict[str, JobClaim] = {}
        self._buffers: dict[str, list[tuple[int, object, subjects.Address]]] = {}
        self._folded_to = 0

    @property
    def held(self) -> list[JobClaim]:
        return list(self._held.values())

    @property
    def load(self) -> Load:
        attempts = [claim.attempt for claim in self._held.values()]
        running = [attempt for attempt in attempts if attempt is not None and not attempt.finished]
        return Load(len(running), attempts.count(None), sum(attempt.tokens for attempt in running))

    def holds(self, claim: JobClaim) -> bool:
        return self._held.get(claim.request.text) is claim

    def take(self, job: Job) -> JobClaim | None:
        """Claim a delivery's job; None if it cannot be read or is held already."""
        if (decoded := _decode(job)) is None:
            return None
        accepted, request = decoded
        if (claim := self._held.get(request.text)) is not None:
            claim.acks.append(job.ack)
            return None
        history = RequestHistory(life=advance(NEW, accepted))
        claim = JobClaim(
            request, accepted, job.stored.stored_at_ns, [job.ack], history, is_repeated=job.deliveries > 1
        )
        self._held[request.text] = claim
        return claim

    async def catch_up(self, claim: JobClaim) -> bool:
        """Read the request's history and follow it; return whether it may be attempted. Raises LogError."""
        request = claim.request
        if not claim.is_repeated and not self._seen.may_include(request):
            self._states.follow(request.text, claim.history.life)
            return True
        self._buffers[request.text] = []
        try:
            history = await self._histories.read(request)
        finally:
            buffered = self._buffers.pop(request.text)
        if not self.holds(claim):
            return False
        if history.accepted is None or history.life.phase == "ended":
            # The log trims only requests that have ended.
            await self._end(request.text)
            return False
        last_at_ns = history.counted[-1].stored_at_ns
        if history.life.live and self.clock.now_ns() - last_at_ns < ATTEMPT_ALIVE_S * SECOND_NS:
            self.drop(claim)
            return False
        self._states.follow(request.text, history.life)
        for sequence, event, at in buffered:
            if sequence > history.position:
                self._states.fold(event, at)
        life = self._states[request.text]
        if life.counted != history.life.counted:
            self.drop(claim)
            return False
        # A delivery may be of an acceptance that was stored twice; only the first one counts.
        claim.accepted_at_ns = history.counted[0].stored_at_ns
        claim.history = history
        history.life = life
        return True

    async def has_counted(self, claim: JobClaim, sequence: int) -> bool:
        """Wait until the reader has passed our start of the attempt; return whether it counted."""
        while self._folded_to < sequence:
            self._reader.hurry()
            await self.advanced.wait()
        return self.holds(claim)

    async def follow(self) -> None:
        """Apply every event of the model, until cancelled. Raises LogError."""
        async for batch in self._reader:
            for stored in batch:
                self.clock.note(stored.stored_at_ns)
                at = subjects.parse(stored.subject)
                assert at is not None, "the reader's subjects are those of requests"
                _, events = codec.decode(stored.data, stored.subject)
                for buffer in self._buffers.values():
                    buffer += [(stored.sequence, event, at) for event in events]
                for event in events:
                    await self._apply(event, at)
            self._folded_to = batch[-1].sequence
            self.advanced.set()

    async def watch_cancels(self, cancels: Follower) -> None:
        """Hurry the reader for each cancel of a request that we hold, until cancelled. Raises LogError."""
        async for batch in cancels:
            for stored in batch:
                for event in codec.decode(stored.data, stored.subject)[1]:
                    if isinstance(event, CancelRequested) and event.request in self._held:
                        self._reader.hurry()

    async def keep_alive(self) -> None:
        """Report every job as in progress to the broker. Raises LogError."""
        self._seen.forget_old(self.clock.newest_ns)
        for claim in self.held:
            for ack in claim.acks:
                await self._log.in_progress(ack)

    def drop(self, claim: JobClaim) -> None:
        """Stop silently, without an answer to the broker: a request that has not ended is delivered again."""
        request = claim.request.text
        del self._held[request]
        if claim.attempt is not None:
            claim.attempt.stop(None)
        self._states.forget(request)
        self._remember(request)

    def drop_job(self, job: Job) -> None:
        """Drop the claim that a delivery belongs to, if there is one."""
        for claim in self.held:
            if job.ack in claim.acks:
                self.drop(claim)

    async def give_back(self, claim: JobClaim, *, delay_s: float = 0.0) -> None:
        """Drop a claim and have its job delivered again, at once or after `delay_s`. Raises LogError."""
        self.drop(claim)
        for ack in claim.acks:
            await self._log.give_back(ack, delay_s=delay_s)

    async def _apply(self, event: object, at: subjects.Address) -> None:
        request = self._states.request_of(event)
        if request is None:
            return
        if request not in self._states:
            if isinstance(event, AttemptStarted | CancelRequested | RequestFinished):
                self._remember(request)
            return
        counted = self._states.fold(event, at)
        claim = self._held[request]
        if counted is None:
            if _rules_out(event, claim.attempt, self._states[request]):
                self.drop(claim)
            return
        life = counted[1]
        if life.phase == "ended":
            await self._end(request)
        elif _supersedes(event, claim.attempt):
            self.drop(claim)
        elif life.wanted is not None and claim.attempt is not None and life.attempt == claim.attempt.id:
            claim.attempt.stop(cancelled_as(life.wanted))

    async def _end(self, request: str) -> None:
        """Acknowledge the job of a request that has ended."""
        claim = self._held[request]
        self.drop(claim)
        for ack in claim.acks:
            await self._log.ack(ack)

    def _remember(self, request: str) -> None:
        self._seen.add(request, position=self._reader.position, now_ns=self.clock.newest_ns)


@asynccontextmanager
async def open_claims(log: Log, shard: int, model: str) -> AsyncIterator[Claims]:
    """Follow the model's events, and take a share of its jobs. `model` is a slug. Raises LogError."""
    stream = subjects.shard_stream(shard)
    cancels_of_model = [subjects.cancels_of_model(shard, model)]
    opened_at = await log.last_sequence(stream)
    newest = await log.get(stream, opened_at) if opened_at else None
    async with (
        log.follow(stream, subjects.of_model(shard, model), after=opened_at, pace_s=READ_PACE_S) as reader,
        log.follow(stream, cancels_of_model, after=opened_at) as cancels,
        log.jobs(shard, model) as jobs,
        anyio.create_task_group() as tasks,
    ):
        claims = Claims(log, reader, jobs, known_from=opened_at)
        if newest is not None:
            # Until the reader has read something, an attempt that ended long ago would look alive.
            claims.clock.note(newest.stored_at_ns)
        tasks.start_soon(claims.follow)
        tasks.start_soon(claims.watch_cancels, cancels)
        yield claims
        tasks.cancel_scope.cancel()


def _decode(job: Job) -> tuple[RequestAccepted, RequestId] | None:
    """Return the delivery's request, or None and leave the job to a newer worker that can read it."""
    try:
        _, (accepted,) = codec.decode(job.stored.data, job.stored.subject)
    except (codec.RecordUnreadable, ValueError) as error:
        logger.error("delivery %d cannot be read: %s", job.stored.sequence, error)
        return None
    if not isinstance(accepted, RequestAccepted):
        kind = type(accepted).__name__
        logger.error("delivery %d is not an accepted request but %s", job.stored.sequence, kind)
        return None
    request = parse_request_id(accepted.request)
    if request is None or subjects.parse(job.stored.subject) != request.at:
        logger.error("delivery %d is not stored at the address of %s", job.stored.sequence, accepted.request)
        return None
    return accepted, request


def _supersedes(event: object, attempt: Attempt | None) -> bool:
    """Return whether an event that counted takes the request away from `attempt`."""
    if isinstance(event, AttemptStarted):
        return attempt is None or event.attempt != attempt.id
    return isinstance(event, AttemptReleased) and attempt is not None and event.attempt == attempt.id


def _rules_out(event: object, attempt: Attempt | None, life: Life) -> bool:
    """Return whether an event that did not count shows that `attempt` never will. `life` is its request's."""
    if attempt is None or getattr(event, "attempt", None) != attempt.id:
        return False
    if isinstance(event, AttemptStarted):
        # A record may be stored twice; the second start of the current attempt means nothing.
        return life.attempt != attempt.id
    return isinstance(event, CancelRequested | RequestFinished)
