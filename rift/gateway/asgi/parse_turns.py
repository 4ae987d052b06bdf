"""When a large body may be parsed, so that one account cannot keep the event loop busy.

The parser stops everything else while it runs. A body of 8 MiB that is one text takes 3 ms, but one of half a
million small values takes 0.4 s, and may be refused then. So the large bodies of one account are parsed one
after the other, each with a rest in proportion to the time that the last one took.
"""

import contextlib
import time
from collections.abc import AsyncIterator

import anyio

# Smaller bodies are parsed within 4 ms, whatever is in them.
SMALL_BYTES = 64 * 1024

# An account rests four times as long as its last large body took: it gets a fifth of the event loop.
REST = 4


class _Turn:
    def __init__(self) -> None:
        self.lock = anyio.Lock()
        self.due_at_s = 0.0


class ParseTurns:
    def __init__(self) -> None:
        # One for each account of the book that ever sent a large body.
        self._turns: dict[str, _Turn] = {}

    @contextlib.asynccontextmanager
    async def turn(self, account: str, size: int) -> AsyncIterator[None]:
        """Wait until the account may parse a body of this many bytes. The block must not wait."""
        if size <= SMALL_BYTES:
            yield
            return
        turn = self._turns.setdefault(account, _Turn())
        async with turn.lock:
            await anyio.sleep_until(turn.due_at_s)
            began_s = time.perf_counter()
            try:
                yield
            finally:
                took_s = time.perf_counter() - began_s
                turn.due_at_s = anyio.current_time() + REST * took_s
