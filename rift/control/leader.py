"""Who of the control processes leads. Each projects; one leads, and the others ask it whether it still does.

    stand by   asks `rift.ask.leader`; silent three times, or nobody there twice (once, at its start)
    stand      appends `ControlElected` with the next epoch, if there is none that it has not read
    lead       whose election counts in the fleet's stream, from then until another's does

The fence is the order of the log, not a lease: what a leader appends that is over does not count, or says
what another says too. So two may lead for a moment (one was frozen, or cut off), and of what a leader does

- decisions carry their epoch, and count only while it is the last (`events/fleet.py`)
- the janitor's words count only where the requests' fold agrees
- a hold is settled and a month closed by the first who says so, and both would say the same
- the archiver seals with the folder locked, and only what follows; what may be trimmed once may be later
- an answer holds what was stored before its question, or says what it lacks, whoever gives it; all who
  lead are asked, so one that hangs keeps no question from the other

What takes effect outside the log has no such fence: so a leader that could not read for `DOUBT_S` that nobody
else was elected stops, before a standby is; and one that was frozen stops with the first that it reads.

What lives here: who leads. What a leader does is `main.py`'s.
"""

import logging
from collections.abc import AsyncIterable, Callable, Coroutine, Sequence
from typing import Any, Literal

import anyio

from events import codec, subjects
from events.fleet import Fleet
from events.log import Conflict, Log, LogError, NoResponders, Stored
from events.schema import ControlElected
from rift.control.rpc.server import answering
from rift.rpc import AskLeader, ask

logger = logging.getLogger(__name__)

# A standby asks so often, and waits as long for the answer: a leader that collects garbage or waits for a
# disk answers later than usual, but not three times. So a standby leads 3.2 s after its leader fell silent,
# at most, and who asks the leader's questions is answered within 5 s.
ASK_S = 0.8
SILENCES = 3
# Where the broker knows nobody who answers, no process is there that leads; it may be about to.
MISSING = 2
MISSING_S = 0.2

# So often a leader looks whether another was elected, and so long it goes on without having been told: less
# than a standby takes that hears nothing from it.
CONFIRM_S = 0.5
DOUBT_S = 2.0
RETRY_S = 0.2

Lead = Callable[[int], Coroutine[Any, Any, None]]
Heard = Literal["leader", "silence", "nobody"]


class Leadership:
    """`fleet` is what was read of the fleet's stream; of a leader, at least up to its election."""

    def __init__(self, log: Log, name: str) -> None:
        self.name = name
        self.fleet = Fleet()
        self._log = log
        # The last record about elections that was read, whether it counts or not.
        self._read_up_to = 0
        self._news = anyio.Event()

    @property
    def leads(self) -> bool:
        return self.fleet.leader == self.name

    async def run(self, lead: Lead) -> None:
        """Stand by, and call `lead` with the epoch when this one leads; cancel it when it does no more."""
        async with (
            self._log.follow(subjects.FLEET, ["rift.fleet.>"], after=0) as reader,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(self._follow, reader)
            await self._confirm()
            missing_max = 1
            while True:
                if self.leads:
                    await self._lead(lead)
                else:
                    await self._stand_by(missing_max)
                missing_max = MISSING
                await self._confirm()

    # --- standing by -----------------------------------------------------------------------------

    async def _stand_by(self, missing_max: int) -> None:
        """Return once it stood for leader, or another took its place."""
        is_told = False
        silences = missing = 0
        while silences < SILENCES and missing < missing_max:
            began_at = anyio.current_time()
            epoch = self._log.epoch
            heard = await self._ask()
            if not self._log.is_connected or self._log.epoch != epoch:
                # The silence is ours.
                heard = "leader"
            silences = silences + 1 if heard == "silence" else 0
            missing = missing + 1 if heard == "nobody" else 0
            if heard == "leader":
                if not is_told:
                    logger.info("%s stands by: %s leads", self.name, self.fleet.leader)
                is_told = True
            if missing < missing_max and silences < SILENCES:
                await anyio.sleep_until(began_at + (MISSING_S if missing else ASK_S))
        await self._stand()

    async def _ask(self) -> Heard:
        try:
            told = await ask(self._log, AskLeader(), timeout_s=ASK_S)
        except NoResponders:
            return "nobody"
        except LogError:
            return "silence"
        # One that does not know yet that it is over says nothing of who leads.
        return "leader" if told["epoch"] >= self.fleet.epoch else "silence"

    async def _stand(self) -> None:
        elected = ControlElected(epoch=self.fleet.epoch + 1, control=self.name)
        data = codec.encode(self.name, [elected])
        try:
            await self._log.append(subjects.FLEET, subjects.LEADER, data, expect_last=self._read_up_to)
        except Conflict:
            logger.info("another was elected before %s", self.name)
        except LogError as error:
            logger.warning("nobody leads, and %s could not stand for it: %s", self.name, error)
            await anyio.sleep(ASK_S)

    # --- leading ---------------------------------------------------------------------------------

    async def _lead(self, lead: Lead) -> None:
        """Lead until another does, or nobody can say."""
        epoch = self.fleet.epoch
        logger.info("%s leads in epoch %d", self.name, epoch)
        async with (
            answering(self._log, {AskLeader: self._answer}),
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(lead, epoch)
            tasks.start_soon(self._doubt, tasks.cancel_scope)
            while self.leads:
                await self._news.wait()
            logger.info(
                "%s leads in epoch %d, and %s no more", self.fleet.leader, self.fleet.epoch, self.name
            )
            tasks.cancel_scope.cancel()

    async def _answer(self, question: AskLeader) -> object:
        return {"epoch": self.fleet.epoch, "control": self.name}

    async def _doubt(self, leading: anyio.CancelScope) -> None:
        """Cancel once it could not be read for a while that nobody else was elected."""
        sure_at = anyio.current_time()
        while anyio.current_time() - sure_at < DOUBT_S:
            asked_at = anyio.current_time()
            with anyio.move_on_at(sure_at + DOUBT_S):
                await self._confirm()
                sure_at = asked_at
            await anyio.sleep_until(asked_at + CONFIRM_S)
        logger.warning("the log does not say whether %s still leads, so it stands by", self.name)
        leading.cancel()

    # --- reading ---------------------------------------------------------------------------------

    async def _confirm(self) -> None:
        """Return once every election is read that is stored by now."""
        while True:
            try:
                last = await self._log.last_sequence(subjects.FLEET, subjects.LEADER)
            except LogError:
                await anyio.sleep(RETRY_S)
                continue
            while self._read_up_to < last:
                await self._news.wait()
            return

    async def _follow(self, reader: AsyncIterable[Sequence[Stored]]) -> None:
        async for batch in reader:
            for stored in batch:
                self.fleet.fold(stored)
                if stored.subject == subjects.LEADER:
                    self._read_up_to = stored.sequence
            news = self._news
            self._news = anyio.Event()
            news.set()
