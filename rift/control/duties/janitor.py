"""The janitor's loop: follow the shard, the fleet and the keys, and say what is due.

It makes one promise true: every accepted request ends. What is due is `watch.py`'s business.
"""

import logging
from collections.abc import Callable, Sequence

import anyio

from events import codec, subjects
from events.log import Follower, Log, LogError, Stored, append_until_known
from events.schema import AnyEvent, LaneLost, RequestAccepted
from rift.control.duties.supervision import Due, End, Offer, Release, Revoke, Supervision

logger = logging.getLogger(__name__)

WRITER = "janitor"
FLEET = ("rift.fleet.>",)
KEYS = (subjects.book("key", "*"),)

# A client whose worker died waits for this; a look at a thousand requests costs a millisecond.
TICK_S = 0.05

# What it hears of the shard may be so old: it holds who works on what, and that changes slowly.
PACE_S = 0.1

# Gateways report every 3 s. After more silence than that the leader is asked whether there was news.
SILENCE_S = 4.0
SILENT_TICK_S = 0.5

# What is due now is due again soon, if the log does not take it.
APPEND_S = 5.0


class Janitor:
    """`accepted` is told the slug of the model that each request is for."""

    def __init__(self, log: Log, *, shard: int, accepted: Callable[[str], None] = lambda slug: None) -> None:
        self._log = log
        self._shard = shard
        self._accepted = accepted
        self._stream = subjects.shard_stream(shard)
        self._watch = Supervision()
        self._newest_ns = 0
        self._newest_at = 0.0
        self._heard_in = -1
        self._heard_at = 0.0

    async def run(self, *, first: int) -> None:
        """Keep the promise for as long as control lives. `first` is at or before every open request."""
        caught_up = await self._log.last_sequence(self._stream)
        everything = f"rift.{self._shard}.>"
        fleet_up_to = await self._log.last_sequence(subjects.FLEET)
        async for batch in self._log.scan(subjects.FLEET, FLEET, first=1, target=fleet_up_to):
            self._see_fleet(batch)
        async with (
            self._log.follow(subjects.FLEET, FLEET, after=fleet_up_to) as fleet,
            self._log.follow(subjects.BOOK, KEYS, after=0) as book,
            self._log.follow(self._stream, [everything], after=first - 1, pace_s=PACE_S) as reader,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(self._follow_fleet, fleet)
            tasks.start_soon(self._follow_book, book)
            tasks.start_soon(self._follow_shard, reader)
            while reader.position < caught_up:  # noqa: ASYNC110  # old news is not acted upon
                await anyio.sleep(TICK_S)
            self._watch.began_ns = self._now_ns()
            while True:
                await anyio.sleep(TICK_S)
                if await self._is_current(reader):
                    for due in self._watch.due(self._now_ns()):
                        await self._act(due)

    def lanes(self) -> dict[str, int]:
        """Return for how many milliseconds each gateway has been silent that is not lost."""
        now_ns = self._now_ns()
        return {lane: max(0, now_ns - at_ns) // 1_000_000 for lane, at_ns in self._watch.lanes.items()}

    async def _is_current(self, reader: Follower) -> bool:
        """Say whether silence is the log's, not ours: who hears nothing must not call others lost."""
        if not self._log.is_connected:
            return False
        if self._heard_in == self._log.epoch and anyio.current_time() - self._heard_at < SILENCE_S:
            return True
        await anyio.sleep(SILENT_TICK_S)
        try:
            current = await self._log.last_sequence(self._stream) <= reader.position
        except LogError:
            return False
        if current:
            self._heard_in = self._log.epoch
            self._heard_at = anyio.current_time()
        return current

    def _now_ns(self) -> int:
        """The broker's time, as far as its messages tell: never ahead of it."""
        return self._newest_ns + int((anyio.current_time() - self._newest_at) * 1e9)

    async def _follow_fleet(self, reader: Follower) -> None:
        async for batch in reader:
            self._see_fleet(batch)

    async def _follow_book(self, reader: Follower) -> None:
        async for batch in reader:
            for stored in batch:
                for event in _events(stored):
                    self._watch.see_book(event)

    def _see_fleet(self, batch: Sequence[Stored]) -> None:
        for stored in batch:
            self._watch.see_fleet(stored)

    async def _follow_shard(self, reader: Follower) -> None:
        async for batch in reader:
            self._heard_in = self._log.epoch
            self._heard_at = anyio.current_time()
            for stored in batch:
                if stored.stored_at_ns > self._newest_ns:
                    self._newest_ns = stored.stored_at_ns
                    self._newest_at = anyio.current_time()
                at = subjects.parse(stored.subject)
                for event in _events(stored):
                    if at is None:
                        self._watch.see_lane(event, stored.stored_at_ns)
                    else:
                        self._watch.see(event, at, stored.sequence, stored.stored_at_ns)
                        if isinstance(event, RequestAccepted):
                            self._accepted(at.model)

    async def _act(self, due: Due) -> None:
        logger.info("%s", due)
        try:
            match due:
                case LaneLost():
                    await self._append(subjects.lane(self._shard, due.lane), due)
                case Revoke():
                    await self._append(subjects.cancel(due.at), due.event)
                case End():
                    await self._append(subjects.work(due.at), due.event)
                case Release():
                    await self._append(subjects.work(due.at), due.event)
                    await self._log.give_back(due.delivery)
                case Offer():
                    await self._offer(due)
        except LogError as error:
            logger.warning("not said, and due again: %s", error)

    async def _append(self, subject: str, event: AnyEvent) -> None:
        data = codec.encode(WRITER, [event])
        await append_until_known(self._log, self._stream, subject, data, within_s=APPEND_S)

    async def _offer(self, due: Offer) -> None:
        """Append the record of the acceptance again, byte for byte."""
        subject = subjects.request(due.at)
        async for batch in self._log.scan(self._stream, [subject], first=due.sequence, target=due.sequence):
            for stored in batch:
                await append_until_known(self._log, self._stream, subject, stored.data, within_s=APPEND_S)


def _events(stored: Stored) -> Sequence[object]:
    """What cannot be read is passed over here alone: all that the janitor says is a hint to the fold, and the
    projector, which bills, stops at such a record visibly."""
    try:
        return codec.decode(stored.data)[1]
    except codec.RecordUnreadable as error:
        logger.error("%s %d: %s", stored.subject, stored.sequence, error)
        return ()
