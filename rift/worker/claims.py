"""Jobs in a worker's hands, and what it remembers of those in others'."""

import logging
from collections.abc import Iterable

import msgspec

from events import codec, subjects
from events.contracts import SECOND_NS
from events.ids import RequestId, parse_request_id
from events.lifecycle import Life
from events.log import Job
from events.request_history import RequestHistory
from events.schema import AttemptReleased, AttemptStarted, CancelRequested, RequestAccepted, RequestFinished
from rift.worker.attempt import Attempt

logger = logging.getLogger(__name__)

# How long it is remembered that a request was touched; older ones are read back.
TOUCHED_NS = 600 * SECOND_NS


class Claim(msgspec.Struct):
    """A job in our hands: its request, where to answer the delivery, and the attempt at it."""

    accepted: RequestAccepted
    at: subjects.Address
    acks: list[str]
    attempt: Attempt | None = None
    prompt_tokens: int = 0


class Load(msgspec.Struct, frozen=True):
    """What a worker has: requests in the engine, jobs that are not begun, and the tokens of the former."""

    running: int = 0
    waiting: int = 0
    tokens: int = 0

    def __add__(self, other: "Load") -> "Load":
        return Load(self.running + other.running, self.waiting + other.waiting, self.tokens + other.tokens)


def load(jobs: Iterable[Claim]) -> Load:
    attempts = [held.attempt for held in jobs]
    running = [attempt for attempt in attempts if attempt is not None and not attempt.finished]
    tokens = sum(attempt.tokens for attempt in running)
    return Load(len(running), attempts.count(None), tokens)


class Claimed(msgspec.Struct, frozen=True):
    """A job that can be attempted: the request's life so far, and its past unless it is fresh."""

    life: Life
    past: RequestHistory | None = None


class SeenRequests:
    """What a reader that began behind `known_from` remembers: requests that somebody started, cancelled or
    ended, by the position and stored time of the last such event."""

    def __init__(self, known_from: int) -> None:
        self._known_from = known_from
        self._at: dict[str, tuple[int, int]] = {}

    def add(self, request: str, *, position: int, now_ns: int) -> None:
        self._at.pop(request, None)
        self._at[request] = position, now_ns

    def may_have(self, request: RequestId) -> bool:
        """Say whether somebody may have touched the request where this reader did not see it, or did.

        The delivery's own position says nothing: an acceptance may be stored again at any time. All that a
        request is stands behind its floor.
        """
        return request.text in self._at or request.floor < self._known_from

    def forget_old(self, now_ns: int) -> None:
        """The oldest come first: `add` puts an entry behind all others."""
        while self._at and self._at[oldest := next(iter(self._at))][1] < now_ns - TOUCHED_NS:
            self._known_from = max(self._known_from, self._at.pop(oldest)[0])


def open_job(job: Job) -> tuple[RequestAccepted, RequestId] | None:
    """Return the delivery's request. One that cannot be read is left for a newer worker."""
    try:
        _, (accepted,) = codec.decode(job.stored.data)
    except (codec.RecordUnreadable, ValueError) as error:
        logger.error("delivery %d cannot be read: %s", job.stored.sequence, error)
        return None
    if not isinstance(accepted, RequestAccepted):
        logger.error("delivery %d cannot be read: %s", job.stored.sequence, accepted)
        return None
    request = parse_request_id(accepted.request)
    if request is None or subjects.parse(job.stored.subject) != request.at:
        logger.error("delivery %d is not at its request's address", job.stored.sequence)
        return None
    return accepted, request


def takes_away(event: object, attempt: Attempt | None) -> bool:
    """Say whether an event that counted means that `attempt` counts no more, or never will."""
    if isinstance(event, AttemptStarted):
        return attempt is None or event.attempt != attempt.id
    return isinstance(event, AttemptReleased) and attempt is not None and event.attempt == attempt.id


def is_against(event: object, attempt: Attempt | None, life: Life) -> bool:
    """Say whether an event that did not count says that `attempt` never will. `life` is its request's."""
    if attempt is None or getattr(event, "attempt", None) != attempt.id:
        return False
    if isinstance(event, AttemptStarted):
        # The same record may be stored twice: the second is against nobody.
        return life.attempt != attempt.id
    return isinstance(event, CancelRequested | RequestFinished)
