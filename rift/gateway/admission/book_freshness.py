"""Whether this gateway's book is current: keys, limits and prices are read from it."""

import logging

import anyio

from events import subjects
from events.book import Book
from events.clock import now_s
from events.log import Log, LogError
from events.wakeup import Wakeup

logger = logging.getLogger(__name__)

# A gateway that cannot follow the book for this long rejects everything: a key may have been revoked.
STALE_S = 10.0

# Each gateway asks the broker this often. A confirmation is as old as its question, so the book stays fresh
# while the broker is away for up to 7 s.
CONFIRM_S = 2.0


class BookFreshness:
    def __init__(self, log: Log, book: Book) -> None:
        self._log = log
        self._book = book
        self._moved = Wakeup()
        # When the newest question was asked whose answer the book has reached.
        self._confirmed_at_s = now_s()

    @property
    def is_fresh(self) -> bool:
        return now_s() - self._confirmed_at_s < STALE_S

    def moved(self) -> None:
        """Note that the book has folded more records."""
        self._moved.set()

    async def confirm(self) -> None:
        """Compare the book with its stream, again and again, for as long as the gateway lives."""
        while True:
            asked_at_s = now_s()
            try:
                last = await self._log.last_sequence(subjects.BOOK)
            except LogError as error:
                logger.warning("the book is not confirmed: %s", error)
            else:
                while self._book.position < last:
                    await self._moved.wait()
                self._confirmed_at_s = asked_at_s
            await anyio.sleep_until(asked_at_s + CONFIRM_S)
