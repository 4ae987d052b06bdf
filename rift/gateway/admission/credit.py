"""Allowances: what this gateway may spend for an account that has credit or a budget.

    before a request is appended   its worst case is reserved from a hold of this lane (`CreditHeld`), or
                                   nothing is accepted
    the request ends, on the log   what it cost is spent of the hold, the rest of the reservation is free
    a hold is not used any more    it is settled (`CreditSettled`), and its rest is the account's again

A hold is this gateway's once the book says so, and until the book says that it is settled. When the lane
falls silent, control settles it (`rift/control/duties/credit_settlement.py`); so a gateway that has not
been able to report for a while reserves nothing. An account without limits passes through here untouched.
"""

import logging
from collections.abc import Callable, Iterable

import anyio
from anyio.abc import TaskGroup
from msgspec.structs import replace

from events import codec, credit, ids, subjects
from events.book import Book
from events.log import Conflict, Log, LogError, OutcomeUnknown, append_until_known
from events.schema import CreditHeld, Price, RequestAccepted
from rift.gateway.admission import max_cost
from rift.gateway.admission.credit_hold import CreditHold, exhausted, unavailable
from rift.gateway.admission.metering import MeteredCompletion, charges
from rift.gateway.choices import Choices
from rift.gateway.streams.lane_registry import LaneRegistry
from rift.gateway.streams.subscription import Subscription

logger = logging.getLogger(__name__)

# A hold takes this part of the room: a gateway keeps little from the others, and writes seldom.
CHUNK_PART = 8
# And no more than a dollar: thousands of requests, and little to miss while a lost gateway's comes back.
CHUNK_NANOUSD_MAX = 1_000_000_000

# A hold that is not used for so long is settled. Each is two records of the book, which forgets nothing: by
# this, who asks now and then writes at most 24 pairs a day. Where the account has no room for another such
# hold, it is settled at once; where more is held than is free, others may need it soon.
IDLE_S = 3600.0
SCARCE_IDLE_S = 30.0
TICK_S = 0.5

# Where holds keep what a request needs, it waits so long for one to be settled: a few ticks.
ROOM_S = 2.0

# A client waits for its hold as long as for its acceptance.
HOLD_S = 10.0

# The reports of a lane come every 3 s. See control/settling.py: what is reserved before that is stored, or
# can be stored no more, before control takes the lane for silent.
REPORTED_S = 10.0

# An acceptance of unknown outcome is cancelled for 35 s (delivery.py); who finds none then finds none ever.
LANDED_S = 45.0
RETRY_S = 1.0

# The last word of a gateway that stops; control says what it could not.
LAST_S = 0.5


class CreditReservations:
    """`reported_at` is when this process last began a report of its lane that was stored."""

    def __init__(
        self,
        log: Log,
        relays: LaneRegistry,
        *,
        book: Book,
        lane: tuple[int, str],
        opened_at: float,
        entropy: Callable[[int], bytes],
        tasks: TaskGroup,
    ) -> None:
        self._log = log
        self._relays = relays
        self._book = book
        self._shard, self._lane = lane
        self._entropy = entropy
        self._tasks = tasks
        self._holds: dict[str, CreditHold] = {}
        self._watchers: dict[str, Subscription] = {}
        self._holding: dict[str, anyio.Lock] = {}
        self._changed = anyio.Event()
        self.reported_at = opened_at

    def changed(self) -> None:
        """The book has moved on, or a reservation was freed."""
        self._changed.set()
        self._changed = anyio.Event()

    # --- before a request is appended ----------------------------------------------------------------

    async def reserve(self, choices: Choices) -> Choices:
        """Reserve the highest cost, if the account is limited, and return the acceptances with their hold.

        The worker refuses a prompt longer than what was reserved. Raises HTTPError (402, 503), LogError: then
        nothing is reserved.
        """
        first = choices[0]
        if not self._book.credits.of(first.account).is_limited:
            return choices
        tokens = max_cost.prompt_tokens(first)
        first = replace(first, prompt_tokens_max=tokens)
        cost = max_cost.nanousd(first, self._price(first), choices=len(choices))
        hold = await self._hold_with(first, cost)
        return tuple(
            replace(accepted, prompt_tokens_max=tokens, allowance=hold.event.id) for accepted in choices
        )

    async def _hold_with(self, accepted: RequestAccepted, cost: int) -> CreditHold:
        """Return a hold in which `cost` was reserved, one's own or a new one."""
        began = anyio.current_time()
        account = accepted.account
        while True:
            changed = self._changed
            if anyio.current_time() - self.reported_at > REPORTED_S:
                raise unavailable("this gateway could not reach the log for a while; try again")
            if (hold := self._find(account, cost)) is not None:
                hold.reserved[accepted.request] = cost
                hold.used_at = anyio.current_time()
                return hold
            standing = self._book.credits.of(account)
            room = standing.room(self._month())
            if room is None or room >= cost:
                if anyio.current_time() > began + HOLD_S:
                    raise unavailable(f"others take from account {account} at the same time; try again")
                await self._take(account, cost)
            elif room + standing.held_nanousd < cost or anyio.current_time() >= began + ROOM_S:
                raise exhausted(account, standing, self._month(), self._free(account), cost)
            else:
                for hold in self._usable(account):
                    hold.is_closing = not hold.reserved
                with anyio.move_on_at(began + ROOM_S):
                    await changed.wait()

    async def _take(self, account: str, cost: int) -> None:
        """Append a hold, one of an account at a time, unless there was one or no room for it by then."""
        async with self._holding.setdefault(account, anyio.Lock()):
            standing = self._book.credits.of(account)
            room = standing.room(self._month())
            if self._find(account, cost) is not None or (room is not None and room < cost):
                return
            chunk = CHUNK_NANOUSD_MAX if room is None else min(room // CHUNK_PART, CHUNK_NANOUSD_MAX)
            # Equal requests leave nothing over.
            amount = cost * max(1, chunk // cost) if cost else chunk
            event = CreditHeld(
                id=f"hold.{ids.new_lane_id(self._entropy(ids.RANDOM_BYTES))}",
                account=account,
                shard=self._shard,
                lane=self._lane,
                nanousd=amount,
            )
            hold = CreditHold(event, standing.sequence, anyio.current_time())
            self._holds[event.id] = hold
            await self._book_reaches(await self._append(hold))

    async def _append(self, hold: CreditHold) -> int:
        """Return a sequence at which the book says whether the hold stands.

        The identical record is repeated while its outcome is unknown. A conflict is somebody else's record,
        or our own of an earlier try; either way no try can be stored behind it. Raises LogError.
        """
        subject = credit.subject(hold.event.account)
        data = codec.encode(self._lane, [hold.event])
        deadline = anyio.current_time() + HOLD_S
        while True:
            try:
                return await self._log.append(subjects.BOOK, subject, data, expect_last=hold.after)
            except Conflict:
                return await self._log.last_sequence(subjects.BOOK, subject)
            except OutcomeUnknown:
                if anyio.current_time() > deadline:
                    raise

    async def _book_reaches(self, sequence: int) -> None:
        with anyio.move_on_after(HOLD_S):
            while self._book.position < sequence:
                await self._changed.wait()

    def _find(self, account: str, cost: int) -> CreditHold | None:
        return next((hold for hold in self._usable(account) if hold.free >= cost), None)

    def _usable(self, account: str) -> list[CreditHold]:
        """The account's holds that are ours by the book, of this month: the last one's budget is not this
        one's."""
        standing = self._book.credits.of(account)
        month = self._month()
        held = [id for id, held in standing.holds.items() if id in self._holds and held.month == month]
        return [self._holds[id] for id in held if not self._holds[id].is_closing]

    def _free(self, account: str) -> int:
        return sum(hold.free for hold in self._usable(account))

    def _month(self) -> str:
        """The month of the newest record known here, never ahead of the broker's. What is taken from an old
        month's room fits into the new one's: a hold that lessens that would have told the month."""
        return credit.month_of(max(self._book.at_ns, self._relays.own.clock.newest_ns))

    def _price(self, accepted: RequestAccepted) -> Price:
        price = self._book.price(accepted.model, accepted.price_version)
        assert price is not None, "what is accepted has a price"
        return price

    # --- until it has ended --------------------------------------------------------------------------

    def follow(self, choices: Choices) -> None:
        """Spend what the requests cost, once they have ended on the own lane."""
        if choices[0].allowance is not None:
            watcher = Subscription(self._metered(choices), on_end=self._at_end)
            self._watchers[choices[0].request] = watcher
            self._relays.own.join(watcher)

    def release(self, choices: Choices) -> None:
        """Free what was reserved for requests that are not accepted."""
        self._unfollow(choices)
        self._spend(choices[0])

    def unknown(self, choices: Choices) -> None:
        """Read from the log which acceptances count, and spend what those from our hold cost."""
        self._unfollow(choices)
        if choices[0].allowance is not None:
            self._tasks.start_soon(self._judge, choices)

    def _unfollow(self, choices: Choices) -> None:
        if (watcher := self._watchers.pop(choices[0].request, None)) is not None:
            self._relays.own.close(watcher)

    def _at_end(self, watcher: Subscription) -> None:
        self._tasks.start_soon(self._ended, watcher)

    async def _ended(self, watcher: Subscription) -> None:
        accepted = watcher.answer.accepted
        self._relays.own.close(watcher)
        if self._watchers.pop(accepted.request, None) is None:
            return
        if accepted.idempotency_hash is not None:
            # Another gateway may have accepted it too, before us, from a hold of its own.
            await self._judge(tuple(answer.accepted for answer in watcher.answers.values()))
        else:
            self._spend(accepted, watcher)

    async def _judge(self, group: Choices) -> None:
        stream = await self._attach(group)
        if stream is None or len(stream.answers) < len(group):
            await anyio.sleep(LANDED_S)
            if stream is not None:
                await self._close(stream)
            stream = await self._attach(group)
        if stream is None:
            self._spend(group[0])
            return
        await stream.wait_for_end()
        await self._close(stream)
        if not stream.open_requests():
            self._spend(group[0], stream)

    async def _attach(self, group: Choices) -> Subscription | None:
        def make(there: list[RequestAccepted]) -> Subscription:
            return Subscription(self._metered(there))

        parsed = [ids.parsed(accepted.request) for accepted in group]
        while True:
            try:
                relay = await self._relays.of(parsed[0].at.shard, parsed[0].at.lane)
                return await relay.attach(parsed, make)
            except LogError as error:
                logger.warning("what %s costs is not known yet: %s", parsed[0].text, error)
                await anyio.sleep(RETRY_S)

    async def _close(self, stream: Subscription) -> None:
        at = ids.parsed(stream.answer.id).at
        (await self._relays.of(at.shard, at.lane)).close(stream)

    def _metered(self, group: Iterable[RequestAccepted]) -> list[MeteredCompletion]:
        return [MeteredCompletion(accepted, self._price(accepted)) for accepted in group]

    def _spend(self, first: RequestAccepted, stream: Subscription | None = None) -> None:
        """Free what was reserved for a group under its first request; spend what of it ours has cost."""
        hold = self._holds.get(first.allowance or "")
        if hold is not None and hold.reserved.pop(first.request, None) is not None:
            ended = (
                [answer for answer in stream.finished if isinstance(answer, MeteredCompletion)]
                if stream
                else []
            )
            for answer, nanousd in charges(ended):
                if answer.accepted.allowance == first.allowance:
                    hold.spend(answer, nanousd)
            hold.used_at = anyio.current_time()
            self.changed()

    # --- settling --------------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Settle what is not used, for as long as the gateway lives."""
        while True:
            await anyio.sleep(TICK_S)
            for hold in list(self._holds.values()):
                if self._is_gone(hold):
                    del self._holds[hold.event.id]
                elif self._is_idle(hold):
                    await self._settle(hold)

    async def settle_all(self) -> None:
        """Settle, while it stops, what has no request under way."""
        with anyio.move_on_after(LAST_S):
            async with anyio.create_task_group() as tasks:
                for hold in self._holds.values():
                    if not hold.reserved and not hold.is_settled and not self._is_gone(hold):
                        tasks.start_soon(self._settle, hold)

    def _is_gone(self, hold: CreditHold) -> bool:
        """It was settled, or never stood and can be stored no more."""
        standing = self._book.credits.of(hold.event.account)
        return hold.event.id not in standing.holds and standing.sequence > hold.after

    def _is_idle(self, hold: CreditHold) -> bool:
        standing = self._book.credits.of(hold.event.account)
        if hold.reserved or hold.is_settled or hold.event.id not in standing.holds:
            return False
        month = self._month()
        if hold.is_closing or standing.holds[hold.event.id].month != month:
            return True
        room = standing.room(month)
        idle_s = IDLE_S
        if room is not None and room < hold.event.nanousd:
            return True
        if room is not None and room < standing.held_nanousd:
            idle_s = SCARCE_IDLE_S
        return anyio.current_time() > hold.used_at + idle_s

    async def _settle(self, hold: CreditHold) -> None:
        hold.is_closing = True
        account = hold.event.account
        data = codec.encode(self._lane, [credit.settlement(hold.event, hold.spent)])
        try:
            await append_until_known(self._log, subjects.BOOK, credit.subject(account), data, within_s=HOLD_S)
            hold.is_settled = True
        except LogError as error:
            logger.warning("%s is not settled yet: %s", hold.event.id, error)
