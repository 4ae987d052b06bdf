"""When a large body may be parsed or a long history read, so that neither can keep the event loop busy.

The parser stops everything else while it runs, in a thread too, because it keeps the interpreter's lock. A
body of 8 MiB that is one text takes 3 ms, but one of half a million small values takes 0.4 s, and may be
refused then. So large bodies are parsed one after the other, each with a rest in proportion to the time that
the last one took. An account has one body in the queue of all accounts, so they take turns.

To show a long history takes up to seconds, but its reader lets other tasks run every few milliseconds. So
several accounts may read at a time, and a rest is in proportion to the whole time of a turn.
"""

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import anyio

from rift.gateway.asgi.errors import ClientGone, HTTPError, retry_after
from rift.gateway.bounds import Bound

# Smaller bodies are parsed within 1 ms, whatever is in them: no longer than the rest of a request takes.
SMALL_BYTES = 16 * 1024

# An account rests four times as long as its last large body took: it gets a fifth of the event loop.
ACCOUNT_REST = 4

# All accounts together rest as long as the last large body took: they get half of the event loop.
REST = 1

# Of all accounts together, this many read long histories at a time; each takes up to 100 MB.
HISTORIES = 4

# An account rests as long as its last long history took.
HISTORY_REST = 1

# Clients of one account that may wait to read a long history.
HISTORIES_WAITING = 32

# The part of all connections that may wait until bodies of one account are parsed. Those connections are not
# closed for others, because their clients wait for the gateway.
WAITING_SHARE = 4

# A shorter rest is added to the next one: the loop's timers count milliseconds, and most bodies take less.
REST_S_MIN = 0.005


class _Share:
    """A part of the loop's time, for one turn at a time or a few."""

    def __init__(self, rest: int, at_once: int = 1) -> None:
        self._rest = rest
        self._at_once = at_once
        self._lock = anyio.Semaphore(at_once)
        self._due_at_s = 0.0

    @property
    def waiting(self) -> int:
        return self._lock.statistics().tasks_waiting

    @property
    def taken(self) -> int:
        return self._at_once - self._lock.value

    @contextlib.asynccontextmanager
    async def ready(self) -> AsyncIterator[None]:
        async with self._lock:
            await anyio.sleep_until(self._due_at_s - REST_S_MIN)
            yield

    def rest(self, took_s: float) -> None:
        now_s = anyio.current_time()
        self._due_at_s = max(self._due_at_s, now_s) + self._rest * took_s


class _Turns:
    """One turn at a time for each account. `refusal` is the message and the code for one too many."""

    def __init__(self, all: _Share, rest: int, waiting_max: int, refusal: tuple[str, str]) -> None:
        self._all = all
        self._rest = rest
        self._waiting_max = waiting_max
        self._refusal = refusal
        # One for each account of the book that ever took a turn.
        self._accounts: dict[str, _Share] = {}

    @property
    def waiting(self) -> int:
        return self._all.waiting + sum(own.waiting for own in self._accounts.values())

    @property
    def taken(self) -> int:
        return self._all.taken

    @contextlib.asynccontextmanager
    async def take(self, account: str, gone: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        """Wait for a turn of the account.

        Raises ClientGone if `gone` returns before, and HTTPError (429) if too many of the account wait.
        """
        own = self._accounts.setdefault(account, _Share(self._rest))
        if own.waiting >= self._waiting_max:
            message, code = self._refusal
            message = f"{own.waiting} {message.format(account=account)}"
            raise HTTPError(429, message, code=code, headers=retry_after(1))
        shares = (own, self._all)
        async with contextlib.AsyncExitStack() as held:
            await _enter(held, shares, gone)
            began_s = time.perf_counter()
            try:
                yield
            finally:
                took_s = time.perf_counter() - began_s
                for share in shares:
                    share.rest(took_s)


class ParseTurns(_Turns):
    def __init__(self, connections: int) -> None:
        waiting_max = max(1, connections // WAITING_SHARE)
        refusal = "bodies of account {account} wait to be parsed: send fewer at a time", "concurrent_bodies"
        super().__init__(_Share(REST), ACCOUNT_REST, waiting_max, refusal)
        self._connections = connections

    def bounds(self) -> list[Bound]:
        return [Bound("waiting_bodies", self._connections, self.waiting)]

    @contextlib.asynccontextmanager
    async def turn(self, account: str, size: int, gone: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
        """Wait until the account may parse a body of this many bytes. The block must not wait.

        Raises as `take`.
        """
        if size <= SMALL_BYTES:
            yield
            return
        async with self.take(account, gone):
            yield


class HistoryTurns(_Turns):
    def __init__(self) -> None:
        refusal = (
            "clients of account {account} wait for long answers: read fewer at a time",
            "concurrent_readers",
        )
        super().__init__(_Share(0, HISTORIES), HISTORY_REST, HISTORIES_WAITING, refusal)

    def bounds(self) -> list[Bound]:
        return [Bound("long_reads", HISTORIES, self.taken)]


async def _enter(
    held: contextlib.AsyncExitStack, shares: tuple[_Share, ...], gone: Callable[[], Awaitable[None]]
) -> None:
    """Enter the shares one after the other. Raises ClientGone if `gone` returns before."""
    is_gone = True
    async with anyio.create_task_group() as tasks:

        async def leave() -> None:
            await gone()
            tasks.cancel_scope.cancel()

        tasks.start_soon(leave)
        for share in shares:
            await held.enter_async_context(share.ready())
        is_gone = False
        tasks.cancel_scope.cancel()
    if is_gone:
        raise ClientGone
