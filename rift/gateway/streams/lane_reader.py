"""Read one lane of the log and pass each event on to the subscriptions of its request.

All subscriptions of a lane share one reader, which folds each event once. Clients receive only what is stored
in the log.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import anyio
from msgspec.structs import replace

from events import codec, subjects
from events.broker_clock import BrokerClock
from events.ids import RequestId
from events.log import Follower
from events.request_history import HistoryReader, in_order, sliced
from events.request_states import RequestStates
from events.schema import ClientAttached, Problem, RequestAccepted
from rift.gateway.dialects.dialect import StreamFormat
from rift.gateway.streams.client_buffer import BufferedBytes, ClientBuffer
from rift.gateway.streams.queue_status import QueueDepth
from rift.gateway.streams.subscription import Subscription

logger = logging.getLogger(__name__)

# The limit for all clients of a lane together. A whole answer is about 100 kB as frames, so this is some
# thousands of clients that read nothing at all.
BUFFERED_BYTES_MAX = 256 * 1024 * 1024

SLOW = Problem(code="slow_reader", message="the client reads too slowly; resume the stream")
UNREADABLE = Problem(code="unreadable", message="this gateway is older than the answer's writer")


class EventCounts(Protocol):
    def note(
        self, request: str, event: Any, life: Any, stored_at_ns: int, answers: Mapping[str, Any]
    ) -> None:
        """Take an event that counted, and the life after it. `answers` are those of the request's body."""

    def forget(self, request: str) -> None:
        """Take nothing more of a request that is no longer followed."""


class LaneReader:
    """Reads one lane for its subscriptions.

    It closes a subscription without a client at its end; the owner of any other subscription closes it.

    `clock` follows the broker's time through this lane's records; a report comes every few seconds. `counts`,
    if set, takes every event that counted.
    """

    def __init__(self, reader: Follower, histories: HistoryReader) -> None:
        self._reader = reader
        self._histories = histories
        self._states = RequestStates()
        self._subscriptions: dict[str, list[Subscription]] = {}
        # Requests whose acceptance is being appended.
        self._unconfirmed: set[str] = set()
        # Requests, ended or not, whose next client someone waits for.
        self._expected: dict[str, list[anyio.Event]] = {}
        self._missed = _Missed()
        # The subscriptions that the current batch has changed.
        self._pushed: dict[int, Subscription] = {}
        self.queue = QueueDepth()
        self.clock = BrokerClock()
        self.buffered = BufferedBytes()
        self.counts: EventCounts | None = None

    @property
    def position(self) -> int:
        return self._reader.position

    @property
    def is_idle(self) -> bool:
        return not (self._subscriptions or self._missed.is_kept or self._expected)

    @property
    def followed(self) -> list[str]:
        """The requests that are followed here."""
        return list(self._subscriptions)

    def open_of(self, key: str) -> list[str]:
        """Return the followed requests that are stored under a key and have not ended."""
        answers = [subscribed[0].answers[request] for request, subscribed in self._subscriptions.items()]
        return [
            answer.id
            for answer in answers
            if answer.accepted.key == key
            and answer.life.phase != "ended"
            and answer.id not in self._unconfirmed
        ]

    def has_client(self, request: str) -> bool:
        """Whether a client of this gateway waits for the request."""
        return any(one.client is not None for one in self._subscriptions.get(request, []))

    @contextmanager
    def expecting_client(self, request: str) -> Iterator[anyio.Event]:
        """Return an event that is set once another client attaches, even after the request's end."""
        attached = anyio.Event()
        self._expected.setdefault(request, []).append(attached)
        try:
            yield attached
        finally:
            self._expected[request].remove(attached)
            if not self._expected[request]:
                del self._expected[request]

    # --- subscribing -----------------------------------------------------------------------------------

    def client(self, format: StreamFormat | None, *, after: int = 0) -> ClientBuffer:
        """Return the buffer of a client that has `after` events; its bytes count against the lane's limit."""
        return ClientBuffer(format, self.buffered, after=after)

    def open(self, subscription: Subscription) -> None:
        """Follow requests before they are appended. Then call `confirm_stored`, or `close` if that failed."""
        for request, answer in subscription.answers.items():
            assert request not in self._subscriptions, "a request is accepted once"
            accepted = answer.accepted
            answer.begin(self.clock.now_ns())
            self.queue.add([accepted])
            self._states.follow(request, answer.life)
            self._unconfirmed.add(request)
            self._subscriptions[request] = [subscription]

    def confirm_stored(self, subscription: Subscription) -> None:
        """Note that the acceptances of an opened subscription are stored."""
        self._unconfirmed.difference_update(subscription.answers)

    def join(self, subscription: Subscription) -> None:
        """Follow requests with another subscription, right after `open`."""
        for request, answer in subscription.answers.items():
            answer.begin(self.clock.now_ns())
            assert answer.life == self._states[request], "an event has been missed"
            self._subscriptions[request].append(subscription)

    async def attach(
        self,
        requests: Sequence[RequestId],
        make: Callable[[list[RequestAccepted]], Subscription],
        *,
        bytes_max: float = math.inf,
    ) -> Subscription | None:
        """Follow requests from their first event on, in any state.

        `make` is given the acceptances that the log holds. Returns None if it holds none.
        Raises LogError, and HistoryTooLong if a history has more than `bytes_max` bytes.
        """
        with self._missed.kept() as missed:
            pasts = await self._histories.read_all(requests, bytes_max=bytes_max)
            stored = [past for past in pasts if past.accepted is not None]
            accepted = [self._shown(past.accepted) for past in stored if past.accepted is not None]
            if not accepted:
                return None
            subscription = make(accepted)
            states = RequestStates()
            for past, first in zip(stored, accepted, strict=True):
                states.follow(first.request, past.life)
                subscription.decrypt_with(first.request, past.seal)
            async for request, counted in sliced(in_order(pasts)):
                subscription.push(request, counted.event, counted.life, counted.stored_at_ns)
            later = missed()
        for event, at, stored_at_ns in later:
            if (folded := states.fold(event, at)) is not None:
                subscription.push(folded[0], event, folded[1], stored_at_ns)
        for answer in [] if subscription.is_over else subscription.open_requests():
            if answer.id not in self._states:
                self._states.follow(answer.id, states[answer.id])
                if answer.life.attempt is not None:
                    self.queue.begin(answer.accepted)
            self._subscriptions.setdefault(answer.id, []).append(subscription)
        return subscription

    def _shown(self, accepted: RequestAccepted) -> RequestAccepted:
        """Return what answers show of an acceptance: a prompt is large, and many clients may come."""
        subscribed = self._subscriptions.get(accepted.request)
        if subscribed and not accepted.content:
            return subscribed[0].answers[accepted.request].accepted
        return replace(accepted, input="", parameters=replace(accepted.parameters, template=None))

    def release_client(self, subscription: Subscription) -> None:
        """Follow the requests to their end without the client, but not if that changes nothing: a detached
        request needs no client, and its first subscription holds its place in the queue."""
        subscription.release_client()
        is_first = any(
            self._subscriptions.get(request, [None])[0] is subscription for request in subscription.answers
        )
        if subscription.is_over or (subscription.answer.accepted.detached and not is_first):
            self.close(subscription)

    def close(self, subscription: Subscription) -> None:
        """Stop following the requests, and drop the client's frames. A second call does nothing."""
        subscription.release_client()
        for request, answer in subscription.answers.items():
            subscribed = self._subscriptions.get(request, [])
            if subscription in subscribed:
                subscribed.remove(subscription)
                if not subscribed:
                    del self._subscriptions[request]
                    self._states.forget(request)
                    self._unconfirmed.discard(request)
                    self.queue.end(answer.accepted)
                    if self.counts is not None:
                        self.counts.forget(request)

    # --- to all ----------------------------------------------------------------------------------------

    def nudge(self, models: Collection[str]) -> None:
        """Wake the clients that wait for one of these models."""
        for subscription in self._every():
            if (
                subscription.client is not None
                and subscription.state == "waiting"
                and subscription.answer.accepted.model in models
            ):
                subscription.client.wake()

    def break_off_all(self, problem: Problem) -> None:
        for subscription in self._every():
            subscription.break_off(problem)

    def _every(self) -> list[Subscription]:
        return [one for subscribed in self._subscriptions.values() for one in subscribed]

    # --- reading ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read until cancelled. Raises codec.RecordUnreadable."""
        async for batch in self._reader:
            self.clock.note(batch[-1].stored_at_ns)
            for stored in batch:
                at = subjects.parse(stored.subject)
                for event in codec.decode(stored.data, stored.subject)[1]:
                    if at is not None:
                        self._fold(event, at, stored.stored_at_ns)
                    elif isinstance(event, ClientAttached):
                        for subscription in self._subscriptions.get(event.request, []):
                            subscription.note_attachment()
                        for attached in self._expected.get(event.request, []):
                            attached.set()
            self._flush()

    def _fold(self, event: Any, at: subjects.Address, stored_at_ns: int) -> None:
        self._missed.add(event, at, stored_at_ns)
        if isinstance(event, codec.Unreadable):
            self._fail(event)
            return
        counted = self._states.fold(event, at)
        if counted is None:
            return
        request, life = counted
        subscribed = self._subscriptions[request]
        if life.phase == "ended":
            self.queue.end(subscribed[0].answers[request].accepted)
        elif life.counted == 2:
            self.queue.begin(subscribed[0].answers[request].accepted)
        for subscription in subscribed:
            subscription.push(request, event, life, stored_at_ns)
            self._pushed[id(subscription)] = subscription
        if self.counts is not None:
            self.counts.note(request, event, life, stored_at_ns, subscribed[0].answers)
        if self.buffered.total > BUFFERED_BYTES_MAX:
            self._break_off_slowest()

    def _flush(self) -> None:
        """Write what one batch brought to a client as one chunk."""
        pushed = self._pushed
        self._pushed = {}
        for subscription in pushed.values():
            if subscription.client is not None:
                subscription.client.flush()
            elif subscription.is_over:
                self.close(subscription)

    def _break_off_slowest(self) -> None:
        clients = [one for one in self._every() if one.client is not None]
        # All bytes may belong to clients whose requests have ended: these are no longer followed.
        slowest = max(clients, key=lambda one: one.client.size if one.client else 0, default=None)
        if slowest is not None and slowest.client is not None and slowest.client.size:
            slowest.break_off(SLOW)

    def _fail(self, event: codec.Unreadable) -> None:
        """Break off the clients of a request whose events only a newer version can read."""
        logger.error("unreadable event %s: %s", event.type, event.problem)
        for subscription in self._subscriptions.get(self._states.request_of(event) or "", []):
            subscription.break_off(UNREADABLE)


class _Missed:
    """The events that arrive while calls read histories: from the start of the earliest call under way."""

    def __init__(self) -> None:
        self._events: list[tuple[Any, subjects.Address, int]] = []
        # The number of events that were dropped, and for each call the number before it, the earliest first.
        self._dropped = 0
        self._since: dict[object, int] = {}

    @property
    def is_kept(self) -> bool:
        """Whether a call is under way."""
        return bool(self._since)

    def __len__(self) -> int:
        return len(self._events)

    def add(self, event: Any, at: subjects.Address, stored_at_ns: int) -> None:
        if self._since:
            self._events.append((event, at, stored_at_ns))

    @contextmanager
    def kept(self) -> Iterator[Callable[[], list[tuple[Any, subjects.Address, int]]]]:
        """Keep events for a call, and return a function that returns them."""
        call = object()
        since = self._since[call] = self._dropped + len(self._events)
        try:
            yield lambda: self._events[since - self._dropped :]
        finally:
            del self._since[call]
            earliest = next(iter(self._since.values()), self._dropped + len(self._events))
            del self._events[: earliest - self._dropped]
            self._dropped = earliest
