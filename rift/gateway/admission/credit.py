"""The credit of each request: reserved before it is accepted, spent once it has ended.

Requests of an account without credit or a budget reserve nothing. The holds that pay are in `lane_credit.py`.
"""

import logging
from collections.abc import Iterable

import anyio
from anyio.abc import TaskGroup
from msgspec.structs import replace

from events import ids
from events.book import Book
from events.contracts import RESERVATION_KEPT_S
from events.log import LogError
from events.schema import Price, RequestAccepted
from rift.gateway.admission import max_cost
from rift.gateway.admission.credit_hold import MeteredCompletion, charges
from rift.gateway.admission.lane_credit import LaneCredit
from rift.gateway.choices import Choices
from rift.gateway.streams.lane_registry import LaneRegistry
from rift.gateway.streams.subscription import Subscription

logger = logging.getLogger(__name__)

RETRY_S = 1.0


class CreditReservations:
    """Implements `reservation.Limit`. `tasks` outlives the requests: it reads what they cost."""

    def __init__(self, holds: LaneCredit, lanes: LaneRegistry, book: Book, tasks: TaskGroup) -> None:
        self.holds = holds
        self._lanes = lanes
        self._book = book
        self._tasks = tasks
        self._watchers: dict[str, Subscription] = {}

    async def reserve(self, choices: Choices) -> Choices:
        """Reserve the highest cost, if the account is limited, and return the acceptances with their hold.

        The worker refuses a prompt that is longer than the reservation.
        Raises HTTPError (402, 503), LogError: then nothing is reserved.
        """
        first = choices[0]
        if not self._book.credits.of(first.account).is_limited:
            return choices
        choices = max_cost.bounded(choices)
        hold = await self.holds.reserve(first, max_cost.nanousd(choices, self._price(first)))
        return tuple(replace(accepted, allowance=hold) for accepted in choices)

    def follow(self, choices: Choices) -> None:
        """Spend the cost of the requests once they have ended on the own lane."""
        if choices[0].allowance is not None:
            watcher = Subscription(self._metered(choices), on_end=self._at_end)
            self._watchers[choices[0].request] = watcher
            self._lanes.own.join(watcher)

    def release(self, choices: Choices) -> None:
        """Free the reservation of requests that are not accepted."""
        self._unfollow(choices)
        self._spend(choices[0])

    def unknown(self, choices: Choices) -> None:
        """Let the log decide which acceptances count, and spend the cost of those from our hold."""
        self._unfollow(choices)
        if choices[0].allowance is not None:
            self._tasks.start_soon(self._spend_from_log, choices)

    def _unfollow(self, choices: Choices) -> None:
        watcher = self._watchers.get(choices[0].request)
        # A repetition under an idempotency key reserves for the same request, and follows nothing.
        if watcher is not None and watcher.answer.accepted is choices[0]:
            del self._watchers[choices[0].request]
            self._lanes.own.close(watcher)

    def _at_end(self, watcher: Subscription) -> None:
        first = watcher.answer.accepted
        self._watchers.pop(first.request, None)
        if first.idempotency_hash is None:
            self._spend(first, watcher)
        else:
            # Another gateway may have accepted it before us, from a hold of its own.
            choices = tuple(answer.accepted for answer in watcher.answers.values())
            self._tasks.start_soon(self._spend_from_log, choices)

    async def _spend_from_log(self, choices: Choices) -> None:
        """Spend the cost that the log shows, and free the rest. Wait until no late acceptance can land."""
        subscription = await self._attach(choices)
        if subscription is None or len(subscription.answers) < len(choices):
            await anyio.sleep(RESERVATION_KEPT_S)
            if subscription is not None:
                await self._close(subscription)
            subscription = await self._attach(choices)
        if subscription is None:
            self._spend(choices[0])
            return
        await subscription.wait_for_end()
        await self._close(subscription)
        if not subscription.open_requests():
            self._spend(choices[0], subscription)

    async def _attach(self, choices: Choices) -> Subscription | None:
        def make(stored: list[RequestAccepted]) -> Subscription:
            return Subscription(self._metered(stored))

        parsed = [ids.parsed(accepted.request) for accepted in choices]
        while True:
            try:
                lane = await self._lanes.of(parsed[0].at.shard, parsed[0].at.lane)
                return await lane.attach(parsed, make)
            except LogError as error:
                logger.warning("the cost of %s is not known yet: %s", parsed[0].text, error)
                await anyio.sleep(RETRY_S)

    async def _close(self, subscription: Subscription) -> None:
        at = ids.parsed(subscription.answer.id).at
        (await self._lanes.of(at.shard, at.lane)).close(subscription)

    def _metered(self, choices: Iterable[RequestAccepted]) -> list[MeteredCompletion]:
        return [MeteredCompletion(accepted, self._price(accepted)) for accepted in choices]

    def _price(self, accepted: RequestAccepted) -> Price:
        price = self._book.price(accepted.model, accepted.price_version)
        assert price is not None, "every accepted request has a price"
        return price

    def _spend(self, first: RequestAccepted, subscription: Subscription | None = None) -> None:
        """Free the reservation of a body's requests, and spend the cost of those that have ended."""
        finished = subscription.finished if subscription is not None else ()
        metered = [answer for answer in finished if isinstance(answer, MeteredCompletion)]
        if first.allowance is not None:
            self.holds.spend(first.request, first.allowance, charges(metered))
