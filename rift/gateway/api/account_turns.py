"""How many calls of one kind an account may have in progress at this gateway."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rift.gateway.asgi.errors import HTTPError, retry_after
from rift.gateway.bounds import Bound

# The control process answers one query at a time. With one running and one waiting, an account loses no time;
# with more, it would make other accounts wait.
QUESTIONS_MAX = 2

# Of all connections, the part that clients of one account may use to read stored requests, most as streams.
READERS_SHARE = 4

RETRY_S = 1


class AccountTurns:
    """`code` and `calls` name the calls in the error. `in_total` is the bound of all accounts, or 0."""

    def __init__(self, most: int, *, code: str, calls: str, in_total: int = 0) -> None:
        self._most = most
        self._in_total = in_total
        self._code = code
        self._calls = calls
        self._under_way: Counter[str] = Counter()

    def bounds(self) -> list[Bound]:
        used = self._under_way.total()
        return [Bound(self._calls, self._in_total, used)] if self._in_total else []

    @contextmanager
    def take(self, account: str) -> Iterator[None]:
        """Raises HTTPError (429) if as many calls of the account as it may have are in progress."""
        if self._under_way[account] >= self._most:
            calls = f"{self._most} {self._calls} of account {account}"
            message = f"{calls} are in progress; try again once one has ended"
            raise HTTPError(429, message, code=self._code, headers=retry_after(RETRY_S))
        self._under_way[account] += 1
        try:
            yield
        finally:
            self._under_way[account] -= 1
            if not self._under_way[account]:
                del self._under_way[account]


def questions() -> AccountTurns:
    return AccountTurns(QUESTIONS_MAX, code="concurrent_questions", calls="queries")


def readers(connections: int) -> AccountTurns:
    most = max(1, connections // READERS_SHARE)
    return AccountTurns(most, code="concurrent_readers", calls="readers", in_total=connections)
