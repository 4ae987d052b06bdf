"""What an account and a key have asked for in the last minute and have under way, and whether more fits.
Pure: time comes in, as nanoseconds that never run backwards.

    requests_per_minute   at most so many are accepted in any 60 s; `n` choices are n requests
    tokens_per_minute     their tokens: estimated when they are accepted, counted once they have ended
    concurrent            at most so many are under way at once

A minute is a window that slides, not a bucket that fills: so the limit holds in every 60 s, and what is said
of when there is room again is what will be. Each gateway counts what it accepts itself, and gives out its
part of a limit: the limit divided by the gateways that live, rounded down, but one at least.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from events.schema import Limits

MINUTE_NS = 60_000_000_000
MS_NS = 1_000_000

Counted = Literal["requests", "tokens"]
What = Literal["requests_per_minute", "tokens_per_minute", "concurrent"]


class Part(msgspec.Struct, frozen=True):
    """What this gateway gives out of somebody's limits; None: without limit."""

    requests: int | None = None
    tokens: int | None = None
    concurrent: int | None = None


def part(limits: Limits, gateways: int) -> Part:
    def of(limit: int | None) -> int | None:
        return None if limit is None else max(1, limit // gateways)

    return Part(of(limits.requests_per_minute), of(limits.tokens_per_minute), of(limits.concurrent))


class Entry(msgspec.Struct):
    """What was accepted at one moment."""

    at_ns: int
    requests: int
    tokens: int
    is_over: bool = False


class Usage:
    """One account's, or key's."""

    def __init__(self) -> None:
        self.requests = self.tokens = self.under_way = 0
        self._entries: deque[Entry] = deque()

    def forget(self, now_ns: int) -> None:
        """Pass over what is older than a minute."""
        while self._entries and self._entries[0].at_ns + MINUTE_NS <= now_ns:
            self.settle(self._entries[0], requests=0, tokens=0)
            self._entries.popleft().is_over = True

    def add(self, now_ns: int, requests: int, tokens: int) -> Entry:
        entry = Entry(now_ns, 0, 0)
        self._entries.append(entry)
        self.settle(entry, requests=requests, tokens=tokens)
        return entry

    def settle(self, entry: Entry, *, requests: int, tokens: int) -> None:
        """Let an entry say what was there in truth; one that is older than a minute says nothing any more."""
        if not entry.is_over:
            self.requests += requests - entry.requests
            self.tokens += tokens - entry.tokens
            entry.requests = requests
            entry.tokens = tokens

    def room_ns(self, now_ns: int, what: Counted, over: int) -> int:
        """Return how long it takes until `over` of what was counted is older than a minute."""
        for entry in self._entries:
            if over <= 0:
                break
            over -= entry.requests if what == "requests" else entry.tokens
            until_ns = entry.at_ns + MINUTE_NS - now_ns
        else:
            assert over <= 0, "what is asked for fits once all else is over"
        return until_ns

    def reset_ns(self, now_ns: int, what: Counted) -> int:
        """Return how long it takes until nothing of it counts any more; what was given back does not."""
        counting = (entry for entry in reversed(self._entries) if getattr(entry, what))
        last = next(counting, None)
        return max(0, last.at_ns + MINUTE_NS - now_ns) if last else 0


class Refused(msgspec.Struct, frozen=True):
    """Whose limit it was, how much of it is this gateway's part, and after how long there is room: None if
    that depends on when something ends, -1 if there never is."""

    whose: str
    what: What
    limit: int
    wait_ns: int | None


class Taken(msgspec.Struct, frozen=True):
    """What a request, or a group of so many, took of each limit."""

    requests: int
    entries: Sequence[tuple[Usage, Entry]]


class RateWindow:
    def __init__(self) -> None:
        self._usages: dict[str, Usage] = {}

    def usage(self, whose: str, now_ns: int) -> Usage:
        usage = self._usages.setdefault(whose, Usage())
        usage.forget(now_ns)
        return usage

    def take(self, parts: Mapping[str, Part], now_ns: int, *, requests: int, tokens: int) -> Taken | Refused:
        """Take it of all limits or, where one has no room, of none: then whoever comes again after `wait_ns`,
        finds room in each, if nobody else took it."""
        found: list[Refused] = []
        for whose, of in parts.items():
            usage = self.usage(whose, now_ns)
            if of.requests is not None and (over := usage.requests + requests - of.requests) > 0:
                wait_ns = usage.room_ns(now_ns, "requests", over) if requests <= of.requests else -1
                found.append(Refused(whose, "requests_per_minute", of.requests, wait_ns))
            if of.tokens is not None and (over := usage.tokens + tokens - of.tokens) > 0:
                wait_ns = usage.room_ns(now_ns, "tokens", over) if tokens <= of.tokens else -1
                found.append(Refused(whose, "tokens_per_minute", of.tokens, wait_ns))
            if of.concurrent is not None and usage.under_way + requests > of.concurrent:
                found.append(
                    Refused(whose, "concurrent", of.concurrent, None if requests <= of.concurrent else -1)
                )
        if found:
            return max(found, key=_patience)
        entries = []
        for whose in parts:
            usage = self.usage(whose, now_ns)
            usage.under_way += requests
            entries.append((usage, usage.add(now_ns, requests, tokens)))
        return Taken(requests, entries)


def _patience(refused: Refused) -> int:
    """What never fits, then what takes longest, then what has no time."""
    if refused.wait_ns is None:
        return 0
    return refused.wait_ns if refused.wait_ns >= 0 else MINUTE_NS + 1


def end(taken: Taken, *, tokens: int | None) -> None:
    """It has ended: with so many tokens, or None where they are not known and the estimate stays."""
    for usage, entry in taken.entries:
        usage.under_way -= taken.requests
        if tokens is not None:
            usage.settle(entry, requests=taken.requests, tokens=tokens)


def undo(taken: Taken) -> None:
    """It was not accepted after all."""
    for usage, entry in taken.entries:
        usage.under_way -= taken.requests
        usage.settle(entry, requests=0, tokens=0)


def headers(parts: Mapping[str, tuple[Part, Usage]], now_ns: int) -> list[tuple[bytes, bytes]]:
    """Return `x-ratelimit-*` as OpenAI names them: of each limit, the one with the least left."""
    told: list[tuple[bytes, bytes]] = []
    name: Counted | Literal["concurrent"]
    for name in ("requests", "tokens", "concurrent"):
        held = []
        for of, usage in parts.values():
            limit = getattr(of, name)
            used = usage.under_way if name == "concurrent" else getattr(usage, name)
            if limit is not None:
                held.append((max(0, limit - used), limit, usage))
        if not held:
            continue
        left, limit, usage = min(held, key=lambda one: one[:2])
        told.append((b"x-ratelimit-limit-%b" % name.encode(), b"%d" % limit))
        told.append((b"x-ratelimit-remaining-%b" % name.encode(), b"%d" % left))
        if name != "concurrent":
            reset_ms = -(-usage.reset_ns(now_ns, name) // MS_NS)
            reset = b"%d.%03ds" % divmod(reset_ms, 1000)
            told.append((b"x-ratelimit-reset-%b" % name.encode(), reset))
    return told
