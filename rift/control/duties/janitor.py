"""The janitor: read the shard, the fleet and the revoked keys, and carry out the actions that are due.

It keeps one promise: every accepted request ends. The rules are in `supervision.py`.
"""

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import anyio

from events import codec, stream_fold, subjects
from events.broker_clock import BrokerClock
from events.contracts import LANE_REPORT_S
from events.log import Follower, ForeignDelivery, Log, LogError, Stored, append_until_known
from events.publisher import Publisher
from events.schema import CancelRequested, LaneLost, RequestAccepted, RequestFinished
from events.wakeup import Wakeup
from replay.warehouse.result import QueryRefused
from rift.control.duties.supervision import Action, AttemptRelease, Redelivery, Supervision

logger = logging.getLogger(__name__)

WRITER = "janitor"
FLEET_SUBJECTS = ("rift.fleet.>",)
KEY_SUBJECTS = (subjects.book("key", "*"),)

# The janitor acts within TICK_S of news: a client whose worker died waits for that. Without news it looks
# every QUIET_TICK_S, as deadlines and silences are seconds.
TICK_S = 0.05
QUIET_TICK_S = 0.5

# The shard may be read this late: its actions follow from silences of seconds.
PACE_S = 0.25

# Gateways report every LANE_REPORT_S. After a longer silence the janitor asks the log whether it missed news.
SILENCE_S = LANE_REPORT_S + 1.0
SILENT_TICK_S = 0.5

# An action that the log does not take is due again soon.
APPEND_S = 5.0

# A rebuild replaces the database within milliseconds.
FIRST_RETRY_S = 0.1


class Janitor:
    """Supervises one shard. `accepted` receives the model's slug of each accepted request; `acted` counts the
    actions that were carried out."""

    def __init__(
        self,
        log: Log,
        *,
        shard: int,
        accepted: Callable[[str], None] = lambda slug: None,
        acted: Counter[str] | None = None,
    ) -> None:
        self._log = log
        self._publisher = Publisher(log, WRITER, shard=shard)
        self.shard = shard
        # Whether it has read the shard to its end and acts.
        self.is_supervising = False
        self._stream = subjects.shard_stream(shard)
        self._accepted = accepted
        self._acted = Counter() if acted is None else acted
        self._supervision = Supervision()
        self._news = Wakeup()
        self._clock = BrokerClock()
        # The connection on which the shard was last known to be read to its end, and when.
        self._current_epoch = -1
        self._current_at_s = 0.0

    async def run(self, first_open: Callable[[str], Awaitable[int]]) -> None:
        """Supervise until cancelled. `first_open` returns a sequence at or before every open request of a
        stream. Raises LogError."""
        first = await self._first(first_open)
        caught_up = await self._log.last_sequence(self._stream)
        replicas = self._supervision.replicas
        await stream_fold.read(self._log, subjects.FLEET, FLEET_SUBJECTS, replicas)
        shard_subjects = [subjects.of_shard(self.shard)]
        async with (
            self._log.follow(subjects.FLEET, FLEET_SUBJECTS, after=replicas.position) as fleet,
            self._log.follow(subjects.BOOK, KEY_SUBJECTS, after=0) as keys,
            self._log.follow(self._stream, shard_subjects, after=first - 1, pace_s=PACE_S) as shard,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(self._follow_fleet, fleet)
            tasks.start_soon(self._follow_keys, keys)
            tasks.start_soon(self._follow_shard, shard)
            # Actions must not follow from a part of the past.
            while shard.position < caught_up:  # noqa: ASYNC110
                await anyio.sleep(TICK_S)
            self._supervision.begin(self._clock.now_ns())
            self.is_supervising = True
            while True:
                news = self._news.pending
                if await self._is_current(shard):
                    for action in self._supervision.due(self._clock.now_ns()):
                        await self._act(action)
                await anyio.sleep(TICK_S)
                with anyio.move_on_after(QUIET_TICK_S - TICK_S):
                    await news.wait()

    async def _first(self, first_open: Callable[[str], Awaitable[int]]) -> int:
        while True:
            try:
                return await first_open(self._stream)
            except QueryRefused as error:
                logger.warning("%s is not supervised yet: %s", self._stream, error)
                await anyio.sleep(FIRST_RETRY_S)

    def lanes(self) -> dict[str, int]:
        """Return for how many milliseconds each live gateway has been silent, by lane."""
        now_ns = self._clock.now_ns()
        return {
            lane: max(0, now_ns - live.reported_at_ns) // 1_000_000
            for lane, live in self._supervision.lanes.items()
        }

    def metrics(self) -> dict[str, str]:
        """Return the address of each live gateway's metrics, by lane."""
        return {lane: live.metrics for lane, live in self._supervision.lanes.items() if live.metrics}

    async def _is_current(self, shard: Follower) -> bool:
        """Return whether a silence is the gateways' and not this process's: if we read nothing, we must not
        declare others lost."""
        if not self._log.is_connected:
            return False
        is_recent = anyio.current_time() - self._current_at_s < SILENCE_S
        if self._current_epoch == self._log.epoch and is_recent:
            return True
        await anyio.sleep(SILENT_TICK_S)
        try:
            is_current = await self._log.last_sequence(self._stream) <= shard.position
        except LogError:
            return False
        if is_current:
            self._note_current()
        return is_current

    def _note_current(self) -> None:
        self._current_epoch = self._log.epoch
        self._current_at_s = anyio.current_time()

    async def _follow_fleet(self, reader: Follower) -> None:
        await stream_fold.drain(reader, self._supervision.replicas, changed=self._news.set)

    async def _follow_keys(self, reader: Follower) -> None:
        async for batch in reader:
            for stored in batch:
                for event in _events(stored):
                    self._supervision.fold_book(event)
            self._news.set()

    async def _follow_shard(self, reader: Follower) -> None:
        async for batch in reader:
            self._note_current()
            for stored in batch:
                self._clock.note(stored.stored_at_ns)
                at = subjects.parse(stored.subject)
                for event in _events(stored):
                    if at is None:
                        self._supervision.fold_lane(event, self._clock.newest_ns)
                    else:
                        self._supervision.fold_request(event, at, stored.sequence, self._clock.newest_ns)
                        if isinstance(event, RequestAccepted):
                            self._accepted(at.model)
            self._news.set()

    async def _act(self, action: Action) -> None:
        logger.info("%s", _sentence(action))
        try:
            match action:
                case AttemptRelease():
                    await self._publisher.publish(action.event, at=action.at, within_s=APPEND_S)
                    await self._give_back(action)
                case Redelivery():
                    await self._redeliver(action)
                case event:
                    await self._publisher.publish(event, within_s=APPEND_S)
            self._acted[_kind(action)] += 1
        except LogError as error:
            # Nor could anyone else append meanwhile.
            self._supervision.note_outage(self._clock.now_ns())
            logger.warning("the log did not store it, so it is repeated: %s: %s", _sentence(action), error)

    async def _give_back(self, action: AttemptRelease) -> None:
        """Give back the delivery that the worker wrote into its event, unless it is not of its queue."""
        try:
            await self._log.give_back(action.delivery, of=action.at)
        except ForeignDelivery as forged:
            logger.error("attempt %s of a replica that is lost: %s", action.event.attempt, forged)

    async def _redeliver(self, action: Redelivery) -> None:
        """Append the record of the acceptance again, byte for byte."""
        subject = subjects.request(action.at)
        sequence = action.sequence
        async for batch in self._log.scan(self._stream, [subject], first=sequence, target=sequence):
            for stored in batch:
                await append_until_known(self._log, self._stream, subject, stored.data, within_s=APPEND_S)


def _kind(action: Action) -> str:
    match action:
        case AttemptRelease():
            return "released"
        case Redelivery():
            return "redelivered"
        case RequestFinished():
            return action.reason
        case CancelRequested():
            return "cancel_requested"
        case LaneLost():
            return "lane_lost"


def _sentence(action: Action) -> str:
    match action:
        case AttemptRelease(event=event):
            return f"attempt {event.attempt} is released: {event.why}"
        case Redelivery():
            return f"the request at {action.sequence} of {action.at.model} is delivered again"
        case RequestFinished():
            return f"{action.request} ends: {action.error.code if action.error else action.reason}"
        case CancelRequested():
            return f"{action.request} is cancelled: {action.why}"
        case LaneLost():
            return f"lane {action.lane} is lost: its gateway is silent"


def _events(stored: Stored) -> Sequence[object]:
    """Return a record's events; none if it cannot be read. Only the janitor may skip such a record: its own
    events are hints to the fold, and the projector, which bills, stops at the record visibly."""
    try:
        return codec.decode(stored.data, stored.subject)[1]
    except codec.RecordUnreadable as error:
        logger.error("%s %d: %s", stored.subject, stored.sequence, error)
        return ()
