"""The rate limits of accounts and keys as a sliding window. Pure: times are monotonic nanoseconds.

    requests_per_minute    accepted in any 60 s; each choice of each prompt is a request
    tokens_per_minute      of the requests accepted in any 60 s: estimated until they end, then exact
    log_bytes_per_minute   stored in any 60 s: acceptances, and answers once they have ended
    concurrent             running at once

The window slides, unlike a token bucket, so a limit holds in every 60 s and the wait in an error is exact.
Only bytes may exceed their limit: a request of one message that comes after a minute without any is accepted,
and answers are counted after they were stored. Those that follow wait.
Each gateway counts the requests that it accepts, against its share: the limit divided by the number of live
gateways, rounded down, but at least one.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Literal

import msgspec

from events.contracts import MESSAGE_BYTES_MAX
from events.schema import Limits

MINUTE_NS = 60_000_000_000
MS_NS = 1_000_000

WindowCount = Literal["requests", "tokens", "log_bytes"]
LimitName = Literal["requests_per_minute", "tokens_per_minute", "log_bytes_per_minute", "concurrent"]


class LimitShare(msgspec.Struct, frozen=True):
    """This gateway's share of the limits of an account or key; None: no limit."""

    requests: int | None = None
    tokens: int | None = None
    concurrent: int | None = None
    log_bytes: int | None = None


def share(limits: Limits, gateways: int) -> LimitShare:
    def divide(limit: int | None) -> int | None:
        return None if limit is None else max(1, limit // gateways)

    return LimitShare(
        divide(limits.requests_per_minute),
        divide(limits.tokens_per_minute),
        divide(limits.concurrent),
        divide(limits.log_bytes_per_minute),
    )


class WindowEntry(msgspec.Struct):
    """Requests that were accepted, or answers that ended, at one moment."""

    at_ns: int
    requests: int = 0
    tokens: int = 0
    log_bytes: int = 0
    is_past: bool = False


class Usage:
    """The requests of one account or key. `forget` must come first: the counts are of the last minute."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self.log_bytes = 0
        self.running = 0
        self._entries: deque[WindowEntry] = deque()

    @property
    def is_empty(self) -> bool:
        return not (self._entries or self.running)

    def forget(self, now_ns: int) -> None:
        """Drop the entries that are older than a minute."""
        while self._entries and self._entries[0].at_ns + MINUTE_NS <= now_ns:
            self.remove(self._entries[0])
            self._entries.popleft().is_past = True

    def add(self, entry: WindowEntry) -> WindowEntry:
        self._entries.append(entry)
        self.requests += entry.requests
        self.tokens += entry.tokens
        self.log_bytes += entry.log_bytes
        return entry

    def remove(self, entry: WindowEntry) -> None:
        """Count nothing for an entry. Entries older than a minute are ignored."""
        if not entry.is_past:
            self.requests -= entry.requests
            self.log_bytes -= entry.log_bytes
            entry.requests = entry.log_bytes = 0
            self.correct(entry, tokens=0)

    def correct(self, entry: WindowEntry, *, tokens: int) -> None:
        """Replace an entry's estimate with the actual tokens. Entries older than a minute are ignored."""
        if not entry.is_past:
            self.tokens += tokens - entry.tokens
            entry.tokens = tokens

    def wait_ns(self, now_ns: int, count: WindowCount, excess: int) -> int:
        """Return the time until `excess` of a count is older than a minute."""
        for entry in self._entries:
            if excess <= 0:
                break
            excess -= getattr(entry, count)
            wait_ns = entry.at_ns + MINUTE_NS - now_ns
        assert excess <= 0, "a request within the limit fits into an empty window"
        return wait_ns

    def reset_ns(self, now_ns: int, count: WindowCount) -> int:
        """Return the time until the count is zero, if nothing is added."""
        counting = (entry for entry in reversed(self._entries) if getattr(entry, count))
        last = next(counting, None)
        return max(0, last.at_ns + MINUTE_NS - now_ns) if last else 0


class Exceeded(msgspec.Struct, frozen=True):
    """A limit without room for a request. `owner` is an account or key, `limit` this gateway's share.

    `wait_ns` is the time until there is room: None if that depends on when a request ends, -1 if a request
    this large never fits.
    """

    owner: str
    name: LimitName
    limit: int
    wait_ns: int | None


class RateReservation(msgspec.Struct, frozen=True):
    """A request, or the `requests` of a group, as each limit counts it."""

    requests: int
    entries: Sequence[tuple[Usage, WindowEntry]]

    def end(self, answer: WindowEntry | None) -> None:
        """Count the requests as ended.

        `answer` has the requests' tokens, and the bytes that were stored after the acceptances. None keeps
        the estimate of the tokens.
        """
        for usage, entry in self.entries:
            usage.running -= self.requests
            if answer is not None:
                usage.correct(entry, tokens=answer.tokens)
                usage.add(WindowEntry(answer.at_ns, log_bytes=answer.log_bytes))

    def undo(self) -> None:
        """Count nothing: the requests are not accepted."""
        for usage, entry in self.entries:
            usage.running -= self.requests
            usage.remove(entry)


class RateWindow:
    def __init__(self) -> None:
        # The next one that `forget` takes first.
        self._usages: dict[str, Usage] = {}

    def __len__(self) -> int:
        return len(self._usages)

    def forget(self, now_ns: int) -> None:
        """Drop the old entries of one owner, and the owner if none is left. Each call takes the next owner.

        So an owner that sends no more requests takes no memory.
        """
        if (owner := next(iter(self._usages), None)) is not None:
            usage = self._usages.pop(owner)
            usage.forget(now_ns)
            if not usage.is_empty:
                self._usages[owner] = usage

    def usage(self, owner: str, now_ns: int) -> Usage:
        usage = self._usages.setdefault(owner, Usage())
        usage.forget(now_ns)
        return usage

    def reserve(self, shares: Mapping[str, LimitShare], asked: WindowEntry) -> RateReservation | Exceeded:
        """Count requests against the shares of all owners, or against none if one has no room.

        The limit returned is the one with the longest wait. After it, all have room, unless other requests
        have taken it.
        """
        exceeded: list[Exceeded] = []
        now_ns = asked.at_ns
        self.forget(now_ns)
        requests = asked.requests
        tokens = asked.tokens
        for owner, limit in shares.items():
            usage = self.usage(owner, now_ns)
            if limit.requests is not None and (excess := usage.requests + requests - limit.requests) > 0:
                fits = requests <= limit.requests
                wait_ns = usage.wait_ns(now_ns, "requests", excess) if fits else -1
                exceeded.append(Exceeded(owner, "requests_per_minute", limit.requests, wait_ns))
            if limit.tokens is not None and (excess := usage.tokens + tokens - limit.tokens) > 0:
                wait_ns = usage.wait_ns(now_ns, "tokens", excess) if tokens <= limit.tokens else -1
                exceeded.append(Exceeded(owner, "tokens_per_minute", limit.tokens, wait_ns))
            if limit.log_bytes is not None and asked.log_bytes > max(limit.log_bytes, MESSAGE_BYTES_MAX):
                exceeded.append(Exceeded(owner, "log_bytes_per_minute", limit.log_bytes, -1))
            elif limit.log_bytes is not None and usage.log_bytes:
                excess = min(usage.log_bytes, usage.log_bytes + asked.log_bytes - limit.log_bytes)
                if excess > 0:
                    wait_ns = usage.wait_ns(now_ns, "log_bytes", excess)
                    exceeded.append(Exceeded(owner, "log_bytes_per_minute", limit.log_bytes, wait_ns))
            if limit.concurrent is not None and usage.running + requests > limit.concurrent:
                fits = requests <= limit.concurrent
                exceeded.append(Exceeded(owner, "concurrent", limit.concurrent, None if fits else -1))
        if exceeded:
            return max(exceeded, key=_severity)
        entries = []
        for owner in shares:
            usage = self.usage(owner, now_ns)
            usage.running += requests
            entries.append((usage, usage.add(copy(asked))))
        return RateReservation(requests, entries)


def _severity(exceeded: Exceeded) -> int:
    """Return the wait, more than any wait if there is never room, and 0 if it is not known."""
    if exceeded.wait_ns is None:
        return 0
    return exceeded.wait_ns if exceeded.wait_ns >= 0 else MINUTE_NS + 1


def headers(usages: Mapping[str, tuple[LimitShare, Usage]], now_ns: int) -> list[tuple[bytes, bytes]]:
    """Return OpenAI's `x-ratelimit-*` headers. Each shows the owner with the least left."""
    shown: list[tuple[bytes, bytes]] = []
    name: WindowCount | Literal["concurrent"]
    for name in ("requests", "tokens", "concurrent"):
        remaining = []
        for limits, usage in usages.values():
            limit = getattr(limits, name)
            used = usage.running if name == "concurrent" else getattr(usage, name)
            if limit is not None:
                remaining.append((max(0, limit - used), limit, usage))
        if not remaining:
            continue
        left, limit, usage = min(remaining, key=lambda one: one[:2])
        shown.append((b"x-ratelimit-limit-%b" % name.encode(), b"%d" % limit))
        shown.append((b"x-ratelimit-remaining-%b" % name.encode(), b"%d" % left))
        if name != "concurrent":
            reset_ms = -(-usage.reset_ns(now_ns, name) // MS_NS)
            reset = b"%d.%03ds" % divmod(reset_ms, 1000)
            shown.append((b"x-ratelimit-reset-%b" % name.encode(), reset))
    return shown
