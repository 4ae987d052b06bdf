"""Leader election among control processes. Every one projects; one leads, and the others check on it.

    stand by   ask on `rift.ask.leader`; after three timeouts, or two "no responders" (one at the start):
    stand      append `ControlElected` with the next epoch, unless the log has an election that was not read
    lead       from its election in the fleet's stream until another one's

The fence is the order of the log, not a lease: whatever a deposed leader appends is ignored or idempotent.
Two processes may lead for a moment, after one was frozen or cut off, so every duty is safe with two:

- decisions carry their epoch and count only while it is the latest (`events/fleet.py`)
- the janitor's events count only if the requests' fold agrees
- a hold is settled, a charge is corrected and a month is closed by the first event; a second leader's would
  be equal
- the archiver locks its folder and only continues it; a segment that may be trimmed stays so
- an answer covers every record before its question, or names the missing ones, whichever leader gives it;
  all leaders are asked, so one that hangs cannot block the others

Effects outside the log have no such fence. A leader that cannot confirm its election for `DOUBT_S` therefore
stops before a standby takes over, and one that was frozen stops at the first election that it reads.

This module only elects. The duties are in `leader_duties.py`.
"""

import logging
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Literal

import anyio

from events import stream_fold, subjects
from events.fleet import Fleet
from events.log import Conflict, Log, LogError, NoResponders, Stored
from events.publisher import Publisher
from events.schema import ControlElected
from events.wakeup import Wakeup
from rift.control.fleet_counts import FleetCounts
from rift.control.rpc.server import serving
from rift.rpc import AskLeader, QuestionRefused, ask

logger = logging.getLogger(__name__)

# The interval of a standby's questions and their timeout. A leader that collects garbage or waits for a disk
# may time out once, but not three times. So a standby takes over within 3.2 s of its leader's silence, and a
# client's question to the leader is answered within 5 s.
ASK_S = 0.8
TIMEOUTS_MAX = 3
# "No responders" means that no leader is connected; one may be about to be.
MISSING_MAX = 2
MISSING_S = 0.2

# A leader confirms its election this often, and leads this long without confirmation: less than a standby
# needs to take over.
CONFIRM_S = 0.75
DOUBT_S = 2.0
RETRY_S = 0.2

# A standby that has not asked for this long is gone.
STANDBY_GONE_S = 4 * ASK_S

assert DOUBT_S < ASK_S * TIMEOUTS_MAX, "a leader that is cut off must stop before a standby takes over"

Lead = Callable[[int], Coroutine[Any, Any, None]]
Reply = Literal["leader", "timeout", "missing"]


class Elections:
    """A fold of the fleet's stream that also remembers the last election, even one that does not count.

    `counts` has what was stored after `counted_after`.
    """

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.last_sequence = 0
        self.counts = FleetCounts()
        self.counted_after = 0

    @property
    def position(self) -> int:
        return self.fleet.position

    def fold(self, stored: Stored) -> None:
        events = self.fleet.fold(stored)
        if stored.sequence > self.counted_after:
            self.counts.note(events)
        if stored.subject == subjects.LEADER:
            self.last_sequence = stored.sequence


class Leadership:
    """One process's part in the election. `fleet` is the fleet's stream as far as this process has read it; a
    leader has read it up to its own election. `metrics` is the address of this process's metrics."""

    def __init__(self, log: Log, name: str, *, metrics: str = "") -> None:
        self.name = name
        self._metrics = metrics
        self._log = log
        self._publisher = Publisher(log, name)
        self._elections = Elections()
        self._changed = Wakeup()
        # When each standby asked last, and the address of its metrics.
        self._standbys: dict[str, tuple[float, str]] = {}

    @property
    def fleet(self) -> Fleet:
        return self._elections.fleet

    @property
    def counts(self) -> FleetCounts:
        return self._elections.counts

    @property
    def standbys(self) -> int:
        """How many processes stood by when this one was last asked as leader."""
        return len(self._standbys)

    @property
    def leads(self) -> bool:
        return self.fleet.leader == self.name

    async def run(self, lead: Lead) -> None:
        """Stand by; when elected, call `lead` with the epoch, and cancel it when another leads."""
        self._elections.counted_after = await self._last()
        async with (
            self._log.follow(subjects.FLEET, ["rift.fleet.>"], after=0) as reader,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(partial(stream_fold.drain, reader, self._elections, changed=self._changed.set))
            await self._confirm()
            missing_max = 1
            while True:
                if self.leads:
                    await self._lead(lead)
                else:
                    await self._stand_by(missing_max)
                missing_max = MISSING_MAX
                await self._confirm()

    # --- standing by -----------------------------------------------------------------------------

    async def _stand_by(self, missing_max: int) -> None:
        """Check on the leader until it is gone, then stand for election."""
        is_logged = False
        timeouts = 0
        missing = 0
        while timeouts < TIMEOUTS_MAX and missing < missing_max:
            asked_at_s = anyio.current_time()
            connection_epoch = self._log.epoch
            reply = await self._ask()
            if not self._log.is_connected or self._log.epoch != connection_epoch:
                # Our own connection was down, so the leader may be fine.
                reply = "leader"
            timeouts = timeouts + 1 if reply == "timeout" else 0
            missing = missing + 1 if reply == "missing" else 0
            if reply == "leader" and not is_logged:
                logger.info("%s stands by: %s leads", self.name, self.fleet.leader)
                is_logged = True
            if missing < missing_max and timeouts < TIMEOUTS_MAX:
                await anyio.sleep_until(asked_at_s + (MISSING_S if missing else ASK_S))
        await self._stand()

    async def _ask(self) -> Reply:
        try:
            question = AskLeader(standby=self.name, metrics=self._metrics)
            answer = await ask(self._log, question, timeout_s=ASK_S)
        except NoResponders:
            return "missing"
        except QuestionRefused:
            # An older version leads, and does not know a field of the question.
            return "leader"
        except LogError:
            return "timeout"
        # A deposed leader may still answer. That does not show that its successor is alive.
        return "leader" if answer["epoch"] >= self.fleet.epoch else "timeout"

    async def _stand(self) -> None:
        elected = ControlElected(epoch=self.fleet.epoch + 1, control=self.name)
        try:
            await self._publisher.publish_at(elected, expect_last=self._elections.last_sequence)
        except Conflict:
            logger.info("another process was elected before %s", self.name)
        except LogError as error:
            logger.warning("the leader is gone, and %s could not stand for election: %s", self.name, error)
            await anyio.sleep(ASK_S)

    # --- leading ---------------------------------------------------------------------------------

    async def _lead(self, lead: Lead) -> None:
        """Lead until another process does, or until the own election cannot be confirmed."""
        epoch = self.fleet.epoch
        logger.info("%s leads in epoch %d", self.name, epoch)
        async with (
            serving(self._log, {AskLeader: self._answer}),
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(lead, epoch)
            tasks.start_soon(self._doubt, tasks.cancel_scope)
            while self.leads:
                await self._changed.wait()
            logger.info(
                "%s leads in epoch %d, so %s stops leading", self.fleet.leader, self.fleet.epoch, self.name
            )
            tasks.cancel_scope.cancel()

    async def _answer(self, question: AskLeader) -> object:
        now_s = anyio.current_time()
        if question.standby:
            self._standbys[question.standby] = now_s, question.metrics
        self._standbys = {
            name: (asked_at_s, metrics)
            for name, (asked_at_s, metrics) in self._standbys.items()
            if now_s - asked_at_s < STANDBY_GONE_S
        }
        metrics = {self.name: self._metrics} | {name: where for name, (_, where) in self._standbys.items()}
        return {
            "epoch": self.fleet.epoch,
            "control": self.name,
            "standbys": sorted(self._standbys),
            "metrics": {name: where for name, where in metrics.items() if where},
        }

    async def _doubt(self, leading: anyio.CancelScope) -> None:
        """Cancel `leading` once the election could not be confirmed for DOUBT_S."""
        confirmed_at_s = anyio.current_time()
        while anyio.current_time() - confirmed_at_s < DOUBT_S:
            asked_at_s = anyio.current_time()
            with anyio.move_on_at(confirmed_at_s + DOUBT_S):
                await self._confirm()
                confirmed_at_s = asked_at_s
            await anyio.sleep_until(asked_at_s + CONFIRM_S)
        logger.warning("%s cannot confirm that it still leads, so it stands by", self.name)
        leading.cancel()

    async def _confirm(self) -> None:
        """Return once every election that is stored now has been read."""
        last = await self._last(subjects.LEADER)
        while self._elections.last_sequence < last:
            await self._changed.wait()

    async def _last(self, subject: str | None = None) -> int:
        """Return the last sequence of the fleet's stream, or of one of its subjects, once the log answers."""
        while True:
            try:
                return await self._log.last_sequence(subjects.FLEET, subject)
            except LogError:
                await anyio.sleep(RETRY_S)
