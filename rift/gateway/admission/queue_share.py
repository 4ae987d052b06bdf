"""How many requests may wait for a model, in all and of one account."""

from events.book import Book
from events.fleet import Fleet
from rift.gateway.admission.rate_limits import SOON_MS
from rift.gateway.asgi.errors import HTTPError, retry_after, retry_after_ms
from rift.gateway.bounds import Bound
from rift.gateway.streams.lane_reader import LaneReader
from rift.gateway.streams.live_gateways import LiveGateways

# Requests of one model that wait here for a worker. Past this the wait is minutes: an error is kinder.
QUEUE_MAX = 1000

# The bytes of these requests: a thirty-second of the smallest log.
QUEUE_BYTES_MAX = 128 * 1024 * 1024

# The part of the queue that one account may fill, unless the book sets another. An account that fills half
# the queue soon holds half the slots, and everyone else waits more than twice as long. At one third the wait
# stays below twice, if that account alone keeps a round of the slots waiting.
QUEUE_SHARE_PERCENT = 33
# Regardless of its share, each account may have half a round of the model's slots waiting. While no replica
# is ready, the number of slots is not known, and this number holds instead.
FREE_COLD = 16


class QueueShare:
    def __init__(self, book: Book, fleet: Fleet, lane: LaneReader, gateways: LiveGateways) -> None:
        self._book = book
        self._fleet = fleet
        self._lane = lane
        self._gateways = gateways

    def bounds(self) -> list[Bound]:
        """Return the bounds of each model's queue, as they are used by the longest."""
        queue = self._lane.queue
        return [
            Bound("waiting_requests", QUEUE_MAX, max(queue.waiting().values(), default=0)),
            Bound("waiting_request_bytes", QUEUE_BYTES_MAX, queue.waiting_bytes()),
        ]

    def check(self, model: str, account: str, choices: int) -> None:
        """Raise HTTPError (429) if the queue is full or, with several accounts, the account's share is."""
        waiting, waiting_bytes = self._lane.queue.length(model)
        if waiting >= QUEUE_MAX or waiting_bytes >= QUEUE_BYTES_MAX:
            message = f"too many requests wait for {model}; try again once some have started"
            raise HTTPError(429, message, code="queue_full", headers=retry_after(5))
        if len(self._book.accounts) < 2:
            return
        limits = self._book.limits.get(account)
        share = (limits and limits.queue_share_percent) or QUEUE_SHARE_PERCENT
        own, own_bytes = self._lane.queue.length(model, account)
        free = self._free(model, others=waiting - own)
        fits = may_wait(own=own, waiting=waiting, more=choices, free=free, share_percent=share)
        if not fits or 100 * own_bytes >= share * QUEUE_BYTES_MAX:
            # The message hides how many requests of other accounts wait.
            message = (
                f"{own} requests of account {account} wait for {model}: with a share of {share} % of the "
                f"queue, no more may wait now; try again once some have started"
            )
            raise HTTPError(429, message, code="queue_share", headers=retry_after_ms(SOON_MS))

    def _free(self, model: str, *, others: int) -> int:
        """Return the requests of a model that each account may have waiting here, regardless of its share."""
        gateways = len(self._gateways)
        if not self._fleet.is_ready(model):
            return max(1, FREE_COLD // gateways)
        slots = self._fleet.slots(model) // gateways
        # Idle slots will soon be taken, by other accounts' requests first.
        idle = max(0, slots - self._lane.queue.running(model) - others)
        return max(1, -(-slots // 2) + idle)


def may_wait(*, own: int, waiting: int, more: int, free: int, share_percent: int) -> bool:
    """Return whether an account with `own` of all `waiting` requests of a model may add `more`.

    It may always add its first, and requests up to `free`; beyond that, up to its share of the queue.
    """
    return own == 0 or own + more <= free or 100 * (own + more) <= share_percent * (waiting + more)
