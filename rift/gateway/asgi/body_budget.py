"""How many bytes of bodies may be under way: in all, and of one account.

A body counts from its first byte until it is parsed: with its `Content-Length` if it has one, else with what
has arrived.
"""

import contextlib
import ctypes
from collections import Counter
from collections.abc import Iterator

from events.contracts import BODY_BYTES_MAX
from rift.gateway.asgi.errors import HTTPError, retry_after
from rift.gateway.bounds import Bound

# 32 of the largest bodies. Parsed, a body takes about twice its bytes for a moment.
BODIES_BYTES_MAX = 256 * 1024 * 1024
# An account may take a quarter, so that three that hold all they may still leave room for the others.
ACCOUNT_BODIES_BYTES_MAX = BODIES_BYTES_MAX // 4

# A small body counts as this: what its connection takes in addition.
BODY_BYTES_MIN = 4 * 1024

# Most bodies arrive within milliseconds, and none takes longer than `request.BODY_S`.
SOON_S = 1

# mallopt's parameter, and the size from which a block is mapped for itself.
M_MMAP_THRESHOLD = -3
MAPPED_BYTES = 1024 * 1024

assert BODY_BYTES_MAX <= ACCOUNT_BODIES_BYTES_MAX, "a body of the largest size must fit"


def return_memory() -> None:
    """Make glibc give large blocks back to the system when they are freed.

    By default it raises its threshold to the size of each mapped block that is freed, up to 32 MiB. Later
    bodies then lie on the heap, where a small block behind them keeps their memory, and the process grows
    with each burst.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)


class BodyHold:
    """The bytes that one body holds of the budget, and the largest size that its route accepts."""

    def __init__(self, budget: "BodyBudget", account: str, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._budget = budget
        self._account = account

    def grow(self, size: int) -> None:
        """Hold at least `size` bytes. Raises HTTPError (413, 429, 503)."""
        if size > self.limit:
            raise too_large(size, self.limit)
        if (more := max(size, BODY_BYTES_MIN) - self.size) > 0:
            self._budget.take(self._account, more)
            self.size += more

    def release(self) -> None:
        self._budget.give(self._account, self.size)
        self.size = 0


class BodyBudget:
    def __init__(self) -> None:
        self.size = 0
        self._accounts: Counter[str] = Counter()

    @contextlib.contextmanager
    def hold(self, account: str, limit: int) -> Iterator[BodyHold]:
        """Hold what a body needs while the context is open."""
        hold = BodyHold(self, account, limit)
        try:
            yield hold
        finally:
            hold.release()

    def bounds(self) -> list[Bound]:
        return [Bound("body_bytes", BODIES_BYTES_MAX, self.size)]

    def take(self, account: str, size: int) -> None:
        """Raises HTTPError (429, 503): then nothing is taken."""
        if self._accounts[account] + size > ACCOUNT_BODIES_BYTES_MAX:
            message = (
                f"bodies of account {account} that this gateway is reading have {self._accounts[account]} "
                f"bytes, and the limit is {ACCOUNT_BODIES_BYTES_MAX}: send fewer at a time"
            )
            raise HTTPError(429, message, code="concurrent_bodies", headers=retry_after(SOON_S))
        if self.size + size > BODIES_BYTES_MAX:
            message = "this gateway is reading as many bodies as it can: try again"
            raise HTTPError(503, message, code="bodies_full", headers=retry_after(SOON_S))
        self.size += size
        self._accounts[account] += size

    def give(self, account: str, size: int) -> None:
        self.size -= size
        self._accounts[account] -= size
        if not self._accounts[account]:
            del self._accounts[account]


def too_large(size: int, limit: int) -> HTTPError:
    problem = f"the body has {size} bytes or more, and the limit is {limit}; send a smaller one"
    if limit < BODY_BYTES_MAX:
        problem += (
            f": this is the limit of /v1/inference, and /v1/chat/completions, /v1/completions and "
            f"/v1/responses accept {BODY_BYTES_MAX} bytes"
        )
    return HTTPError(413, problem, code="body_too_large")
