"""Jobs in a worker's hands, and what it remembers of those in others'."""

import logging

import msgspec

from events import codec, subjects
from events.history import Past
from events.ids import RequestId, parse_request_id
from events.lifecycle import Life
from events.log import Job
from events.schema import RequestAccepted
from rift.worker.attempt import Attempt

logger = logging.getLogger(__name__)

# What is remembered of requests that others touched. A job older than this is read back anyway.
TOUCHED_NS = 600 * 1_000_000_000


class Held(msgspec.Struct):
    """A job in our hands: its request, where to answer the delivery, and the attempt at it."""

    accepted: RequestAccepted
    at: subjects.Address
    acks: list[str]
    attempt: Attempt | None = None
    prompt_tokens: int = 0


class Taken(msgspec.Struct, frozen=True):
    """A job that can be attempted: the request's life so far, and its past unless it is fresh."""

    life: Life
    past: Past | None = None


class Touched:
    """Requests that somebody started, cancelled or ended, by the stored time of the last such event."""

    def __init__(self) -> None:
        self._at_ns: dict[str, int] = {}

    def add(self, request: str, now_ns: int) -> None:
        self._at_ns.pop(request, None)
        self._at_ns[request] = now_ns

    def may_have(self, request: str, job: Job, now_ns: int) -> bool:
        """Say whether somebody may have touched the request of a job since it was accepted."""
        return request in self._at_ns or now_ns - job.stored.stored_at_ns > TOUCHED_NS

    def forget_old(self, now_ns: int) -> None:
        """The oldest come first: `add` puts an entry behind all others."""
        while self._at_ns and self._at_ns[oldest := next(iter(self._at_ns))] < now_ns - TOUCHED_NS:
            del self._at_ns[oldest]


def open_job(job: Job) -> tuple[RequestAccepted, RequestId] | None:
    """Return the delivery's request. One that cannot be read is left for a newer worker."""
    try:
        _, (accepted,) = codec.decode(job.stored.data)
    except ValueError as error:
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
