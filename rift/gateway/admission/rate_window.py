"""The rate limits of accounts and keys as a sliding window. Pure: times are monotonic nanoseconds.

    requests_per_minute   accepted in any 60 s; `n` choices are n requests
    tokens_per_minute     of the requests accepted in any 60 s: estimated until they end, then exact
    concurrent            running at once

The window slides, unlike a token bucket, so a limit holds in every 60 s and the wait in an error is exact.
Each gateway counts the requests that it accepts, against its share: the limit divided by the number of live
gateways, rounded down, but at least one.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from events.schema import Limits

MINUTE_NS = 60_000_000_000
MS_NS = 1_000_000

WindowCount = Literal["requests", "tokens"]
LimitName = Literal["requests_per_minute", "tokens_per_minute", "concurrent"]


class LimitShare(msgspec.Struct, frozen=True):
    """This gateway's share of the limits of an account or key; None: no limit."""

    requests: int | None = None
    tokens: int | None = None
    concurrent: int | None = None


def share(limits: Limits, gateways: int) -> LimitShare:
    def divide(limit: int | None) -> int | None:
        return None if limit is None else max(1, limit // gateways)

    return LimitShare(
        divide(limits.requests_per_minute), divide(limits.tokens_per_minute), divide(limits.concurrent)
    )


class WindowEntry(msgspec.Struct):
    """Requests that were accepted at one moment."""

    at_ns: int
    requests: int
    tokens: int
    is_past: bool = False


class Usage:
    """The requests of one account or key. `forget` must come first: the counts are of the last minute."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self.running = 0
        self._entries: deque[WindowEntry] = deque()

    def forget(self, now_ns: int) -> None:
        """Drop the entries that are older than a minute."""
        while self._entries and self._entries[0].at_ns + MINUTE_NS <= now_ns:
            self.correct(self._entries[0], requests=0, tokens=0)
            self._entries.popleft().is_past = True

    def add(self, now_ns: int, requests: int, tokens: int) -> WindowEntry:
        entry = WindowEntry(now_ns, 0, 0)
        self._entries.append(entry)
        self.correct(entry, requests=requests, tokens=tokens)
        return entry

    def correct(self, entry: WindowEntry, *, requests: int, tokens: int) -> None:
        """Replace an entry's estimate with the actual usage. Entries older than a minute are ignored."""
        if not entry.is_past:
            self.requests += requests - entry.requests
            self.tokens += tokens - entry.tokens
            entry.requests = requests
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

    def end(self, *, tokens: int | None) -> None:
        """Count the requests as ended, with these tokens. None keeps the estimate."""
        for usage, entry in self.entries:
            usage.running -= self.requests
            if tokens is not None:
                usage.correct(entry, requests=self.requests, tokens=tokens)

    def undo(self) -> None:
        """Count nothing: the requests are not accepted."""
        for usage, entry in self.entries:
            usage.running -= self.requests
            usage.correct(entry, requests=0, tokens=0)


class RateWindow:
    def __init__(self) -> None:
        self._usages: dict[str, Usage] = {}

    def usage(self, owner: str, now_ns: int) -> Usage:
        usage = self._usages.setdefault(owner, Usage())
        usage.forget(now_ns)
        return usage

    def reserve(
        self, shares: Mapping[str, LimitShare], now_ns: int, *, requests: int, tokens: int
    ) -> RateReservation | Exceeded:
        """Count requests against the shares of all owners, or against none if one has no room.

        The limit returned is the one with the longest wait. After it, all have room, unless other requests
        have taken it.
        """
        exceeded: list[Exceeded] = []
        for owner, limit in shares.items():
            usage = self.usage(owner, now_ns)
            if limit.requests is not None and (excess := usage.requests + requests - limit.requests) > 0:
                fits = requests <= limit.requests
                wait_ns = usage.wait_ns(now_ns, "requests", excess) if fits else -1
                exceeded.append(Exceeded(owner, "requests_per_minute", limit.requests, wait_ns))
            if limit.tokens is not None and (excess := usage.tokens + tokens - limit.tokens) > 0:
                wait_ns = usage.wait_ns(now_ns, "tokens", excess) if tokens <= limit.tokens else -1
                exceeded.append(Exceeded(owner, "tokens_per_minute", limit.tokens, wait_ns))
            if limit.concurrent is not None and usage.running + requests > limit.concurrent:
                fits = requests <= limit.concurrent
                exceeded.append(Exceeded(owner, "concurrent", limit.concurrent, None if fits else -1))
        if exceeded:
            return max(exceeded, key=_severity)
        entries = []
        for owner in shares:
            usage = self.usage(owner, now_ns)
            usage.running += requests
            entries.append((usage, usage.add(now_ns, requests, tokens)))
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
