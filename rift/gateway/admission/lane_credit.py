"""The credit that this gateway's lane holds for accounts with credit or a budget.

    a request is accepted    its highest cost is reserved from a hold of this lane; if none has room, a new
                             hold (`CreditHeld`) is appended to the book first
    the request has ended    its cost is spent from the hold, and the rest of the reservation is free again
    the hold is idle         it is settled (`CreditSettled`), and the account gets back the rest

A hold is this lane's from the moment the book contains it until the book contains its settlement. Control
settles the holds of a silent lane (`rift/control/duties/credit_settlement.py`), so a gateway whose reports
fail reserves nothing.
"""

import logging
from collections.abc import Callable, Iterable

import anyio

from events import credit, ids
from events.broker_clock import BrokerClock
from events.clock import now_s
from events.contracts import ACCEPT_S, RESERVE_AFTER_REPORT_S
from events.log import Conflict, OutcomeUnknown
from events.publisher import Publisher, destination
from events.schema import CreditHeld, RequestAccepted
from events.wakeup import Wakeup
from rift.gateway.admission.credit_hold import CreditHold, MeteredCompletion, exhausted, unavailable
from rift.gateway.state import GatewayConfig, LogState

logger = logging.getLogger(__name__)

# A hold takes this part of the account's room: it leaves most to other gateways, and holds are rare.
CHUNK_PART = 8
# A dollar pays for thousands of requests, and is little to miss until a lost gateway's holds are settled.
CHUNK_NANOUSD_MAX = 1_000_000_000

# A hold and its settlement are two records that the book keeps for ever. With this limit, an account with
# rare requests writes at most 24 pairs a day. If the account has no room for another such hold, the hold is
# settled at once; if more is held than free, other gateways may soon need it.
IDLE_S = 3600.0
SCARCE_IDLE_S = 30.0
TICK_S = 0.5

# If idle holds keep what a request needs, it waits this long for their settlement: a few ticks.
ROOM_S = 2.0

# A client waits for a hold as long as for an acceptance.
HOLD_S = ACCEPT_S

# A stopping gateway settles its holds for this long; control settles the rest.
SETTLE_ALL_S = 0.5


class LaneCredit:
    """The holds of this lane. `clock` is that of the lane's reader, and `reported_at_s` returns when this
    process began its last stored lane report."""

    def __init__(
        self,
        state: LogState,
        config: GatewayConfig,
        clock: BrokerClock,
        *,
        reported_at_s: Callable[[], float],
    ) -> None:
        self._log = state.log
        self._book = state.book
        self._config = config
        self._publisher = Publisher(state.log, config.lane, shard=config.shard)
        self._clock = clock
        self._reported_at_s = reported_at_s
        self._holds: dict[str, CreditHold] = {}
        self._locks: dict[str, anyio.Lock] = {}
        self._changed = Wakeup()

    def changed(self) -> None:
        """Wake requests that wait for room: the book has changed, or a reservation is free again."""
        self._changed.set()

    # --- reserve and spend ---------------------------------------------------------------------------

    async def reserve(self, accepted: RequestAccepted, cost: int) -> str:
        """Reserve `cost` for a request from a hold of its account, and return the hold's id.

        Raises HTTPError (402, 503), LogError: then nothing is reserved.
        """
        began_at_s = now_s()
        account = accepted.account
        while True:
            changed = self._changed.pending
            if now_s() - self._reported_at_s() > RESERVE_AFTER_REPORT_S:
                raise unavailable("this gateway could not reach the log for a while; try again")
            if (hold := self._find(account, cost)) is not None:
                hold.reserved[accepted.request] = cost
                hold.used_at_s = now_s()
                return hold.event.id
            balance = self._book.credits.of(account)
            room = balance.room(self._month())
            if room is None or room >= cost:
                if now_s() > began_at_s + HOLD_S:
                    raise unavailable(
                        f"other gateways take credit of account {account} at the same time; try again"
                    )
                await self._append_hold(account, cost)
            elif room + balance.held_nanousd < cost or now_s() >= began_at_s + ROOM_S:
                free = sum(hold.free for hold in self._usable(account))
                raise exhausted(account, balance, self._month(), free, cost)
            else:
                for hold in self._usable(account):
                    hold.is_closing = not hold.reserved
                with anyio.move_on_at(began_at_s + ROOM_S):
                    await changed.wait()

    def spend(self, request: str, hold_id: str, charged: Iterable[tuple[MeteredCompletion, int]]) -> None:
        """Free what a request reserved, and spend the nano-USD that it and its group are charged."""
        hold = self._holds.get(hold_id)
        if hold is not None and hold.reserved.pop(request, None) is not None:
            for answer, nanousd in charged:
                if answer.accepted.allowance == hold_id:
                    hold.spend(answer, nanousd)
            hold.used_at_s = now_s()
            self.changed()

    async def _append_hold(self, account: str, cost: int) -> None:
        """Append a hold, one per account at a time, unless one has room or the account has none by then."""
        async with self._locks.setdefault(account, anyio.Lock()):
            balance = self._book.credits.of(account)
            room = balance.room(self._month())
            if self._find(account, cost) is not None or (room is not None and room < cost):
                return
            chunk = CHUNK_NANOUSD_MAX if room is None else min(room // CHUNK_PART, CHUNK_NANOUSD_MAX)
            # A multiple of the cost, so that equal requests use up the hold.
            amount = cost * max(1, chunk // cost) if cost else chunk
            event = CreditHeld(
                id=f"hold.{ids.new_lane_id(self._config.entropy(ids.RANDOM_BYTES))}",
                account=account,
                shard=self._config.shard,
                lane=self._config.lane,
                nanousd=amount,
            )
            hold = CreditHold(event, balance.sequence, now_s())
            self._holds[event.id] = hold
            sequence = await self._publish(hold)
            with anyio.move_on_after(HOLD_S):
                while self._book.position < sequence:
                    await self._changed.wait()

    async def _publish(self, hold: CreditHold) -> int:
        """Return a sequence at which the book shows whether the hold was stored.

        Repeats the identical record while its outcome is unknown. A conflict is a record of another writer,
        or our own from an earlier try; in both cases no try can be stored later. Raises LogError.
        """
        deadline_s = now_s() + HOLD_S
        while True:
            try:
                return await self._publisher.publish_at(hold.event, expect_last=hold.after)
            except Conflict:
                return await self._log.last_sequence(*destination(hold.event))
            except OutcomeUnknown:
                if now_s() > deadline_s:
                    raise

    def _find(self, account: str, cost: int) -> CreditHold | None:
        return next((hold for hold in self._usable(account) if hold.free >= cost), None)

    def _usable(self, account: str) -> list[CreditHold]:
        """Return this month's holds that the book confirms: each counts in one month's budget."""
        month = self._month()
        confirmed = self._book.credits.of(account).holds.items()
        own = [self._holds[id] for id, one in confirmed if id in self._holds and one.month == month]
        return [hold for hold in own if not hold.is_closing]

    def _month(self) -> str:
        """Return the month of the newest record read here, which is never ahead of the broker's.

        Room computed for a month that has just ended is safe: any hold that reduces the new month's room
        would have shown the new month here.
        """
        return credit.month_of(max(self._book.at_ns, self._clock.newest_ns))

    # --- settle --------------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Settle idle holds for as long as the gateway lives."""
        while True:
            await anyio.sleep(TICK_S)
            for hold in list(self._holds.values()):
                if self._is_gone(hold):
                    del self._holds[hold.event.id]
                elif self._is_idle(hold):
                    await self._settle(hold)

    async def settle_all(self) -> None:
        """Settle, before the gateway stops, every hold without a running request."""
        with anyio.move_on_after(SETTLE_ALL_S):
            async with anyio.create_task_group() as tasks:
                for hold in self._holds.values():
                    if not hold.reserved and not hold.is_settled and not self._is_gone(hold):
                        tasks.start_soon(self._settle, hold)

    def _is_gone(self, hold: CreditHold) -> bool:
        """Return whether the hold is settled, or was not stored and never will be."""
        balance = self._book.credits.of(hold.event.account)
        return hold.event.id not in balance.holds and balance.sequence > hold.after

    def _is_idle(self, hold: CreditHold) -> bool:
        balance = self._book.credits.of(hold.event.account)
        if hold.reserved or hold.is_settled or hold.event.id not in balance.holds:
            return False
        month = self._month()
        if hold.is_closing or balance.holds[hold.event.id].month != month:
            return True
        room = balance.room(month)
        if room is not None and room < hold.event.nanousd:
            return True
        is_scarce = room is not None and room < balance.held_nanousd
        return now_s() > hold.used_at_s + (SCARCE_IDLE_S if is_scarce else IDLE_S)

    async def _settle(self, hold: CreditHold) -> None:
        hold.is_closing = True
        settlement = credit.settlement(hold.event, hold.spent)
        hold.is_settled = await self._publisher.try_publish(settlement, within_s=HOLD_S)
