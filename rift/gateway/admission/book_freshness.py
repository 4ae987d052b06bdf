"""Whether the book that a gateway holds is the book as it is: keys, limits and prices are read from it."""

import logging

import anyio

from events import subjects
from events.book import Book
from events.log import Log, LogError

logger = logging.getLogger(__name__)

# Who cannot follow the book for so long refuses all: a key may have been revoked since.
STALE_S = 10.0

# One question a gateway to the broker. What is confirmed is as old as the question, so a broker that is away
# for 7 s is waited out.
CONFIRM_S = 2.0


class BookFreshness:
    """`confirmed_at` is when the question was asked whose answer the book has reached."""

    def __init__(self, log: Log, book: Book) -> None:
        self._log = log
        self._book = book
        self._moved = anyio.Event()
        self.confirmed_at = anyio.current_time()

    @property
    def is_fresh(self) -> bool:
        return anyio.current_time() - self.confirmed_at < STALE_S

    def moved(self) -> None:
        """The book was read on."""
        self._moved.set()
        self._moved = anyio.Event()

    async def confirm(self) -> None:
        """Ask how far the book is, and read up to there, again and again for as long as the gateway lives."""
        while True:
            asked_at = anyio.current_time()
            try:
                last = await self._log.last_sequence(subjects.BOOK)
            except LogError as error:
                logger.warning("the book is not confirmed: %s", error)
            else:
                while self._book.position < last:
                    await self._moved.wait()
                self.confirmed_at = asked_at
            await anyio.sleep_until(asked_at + CONFIRM_S)
