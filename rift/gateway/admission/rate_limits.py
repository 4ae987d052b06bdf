"""The rate limits of accounts and keys at this gateway. `rate_window.py` has the rules."""

from typing import Any

from msgspec.structs import replace

from events.book import Book
from events.clock import now_s
from events.lifecycle import Life
from rift.gateway.admission import rate_window, request_size
from rift.gateway.admission.log_share import LogShare
from rift.gateway.admission.rate_window import (
    Exceeded,
    LimitShare,
    RateReservation,
    RateWindow,
    WindowEntry,
)
from rift.gateway.asgi.errors import FINAL, Headers, HTTPError, retry_after_ms
from rift.gateway.choices import Choices, sum_over_prompts
from rift.gateway.completion import Completion
from rift.gateway.streams.lane_reader import LaneReader
from rift.gateway.streams.live_gateways import LiveGateways
from rift.gateway.streams.subscription import Subscription

# When a request will end is not known; a short answer ends within this.
SOON_MS = 1000

UNITS = {
    "requests_per_minute": "requests per minute",
    "tokens_per_minute": "tokens per minute",
    "log_bytes_per_minute": "bytes of the log per minute",
    "concurrent": "concurrent requests",
}


class RateLimits:
    """Implements `reservation.Limit`. A limit is divided among `gateways`."""

    def __init__(self, lane: LaneReader, *, book: Book, gateways: LiveGateways, share: LogShare) -> None:
        self._lane = lane
        self._share = share
        self._book = book
        self._gateways = gateways
        self._window = RateWindow()
        # A repetition under an idempotency key reserves for the same request again.
        self._reserved: dict[str, list[RateReservation]] = {}
        self._watchers: dict[str, Subscription] = {}

    async def reserve(self, choices: Choices) -> Choices:
        """Count the requests against their limits. Raises HTTPError (429): then nothing is counted."""
        first = choices[0]
        if shares := self._shares(first.account, first.key):
            asked = _asked(choices)
            reserved = self._window.reserve(shares, asked)
            if isinstance(reserved, Exceeded):
                raise _refusal(reserved, choices)
            self._reserved.setdefault(first.request, []).append(reserved)
        return choices

    def follow(self, choices: Choices) -> None:
        """Replace the estimate with the actual tokens, once the requests have ended on the own lane."""
        if choices[0].request in self._reserved:
            answers = [Completion.of(accepted, self._book, keep_text=False) for accepted in choices]
            watcher = self._watchers[choices[0].request] = EndWatcher(answers, on_end=self._at_end)
            self._lane.join(watcher)

    def release(self, choices: Choices) -> None:
        """Count nothing for requests that are not accepted."""
        if (reserved := self._forget(choices)) is not None:
            reserved.undo()

    def unknown(self, choices: Choices) -> None:
        """Count the estimate for requests that may run elsewhere, but not as concurrent."""
        if (reserved := self._forget(choices)) is not None:
            reserved.end(None)

    def _forget(self, choices: Choices) -> RateReservation | None:
        request = choices[0].request
        watcher = self._watchers.get(request)
        if watcher is not None and watcher.answer.accepted is choices[0]:
            del self._watchers[request]
            self._lane.close(watcher)
        return self._take(request)

    def _take(self, request: str) -> RateReservation | None:
        """Remove one reservation of a request. All of a request are of the same size."""
        if (reserved := self._reserved.get(request)) is None:
            return None
        taken = reserved.pop()
        if not reserved:
            del self._reserved[request]
        return taken

    def headers(self, account: str, key: str) -> Headers:
        """Return the headers that show the limits as they are now."""
        now_ns = _now_ns()
        shares = self._shares(account, key)
        usages = {owner: (share, self._window.usage(owner, now_ns)) for owner, share in shares.items()}
        return rate_window.headers(usages, now_ns)

    def _shares(self, account: str, key: str) -> dict[str, LimitShare]:
        """Return this gateway's share of each limit, by its owner."""
        gateways = len(self._gateways)
        limits = self._book.limits_of(account, key)
        shares = {owner: rate_window.share(limit, gateways) for owner, limit in limits.items()}
        if (log_bytes := self._share.bytes_per_minute(account)) is not None:
            owner = f"account {account}"
            own = shares.get(owner, LimitShare())
            shares[owner] = replace(own, log_bytes=max(1, log_bytes // self._gateways.on_own_shard()))
        return {owner: share for owner, share in shares.items() if share != LimitShare()}

    def _at_end(self, watcher: Subscription) -> None:
        request = watcher.answer.id
        self._watchers.pop(request, None)
        if (reserved := self._take(request)) is not None:
            reserved.end(_answered(list(watcher.answers.values())))


class EndWatcher(Subscription):
    """Follows requests for their ends only, so that it costs next to nothing while they run."""

    def push(self, request: str, event: Any, life: Life, stored_at_ns: int) -> None:
        if life.phase == "ended":
            super().push(request, event, life, stored_at_ns)


def _asked(choices: Choices) -> WindowEntry:
    tokens = request_size.tokens(choices)
    return WindowEntry(_now_ns(), len(choices), tokens, request_size.stored_bytes(choices))


def _answered(answers: list[Completion]) -> WindowEntry:
    """Return what ended requests have used. Each prompt counts once, as on the bill."""
    tokens = sum_over_prompts(answers, lambda answer: answer.life.prompt_tokens)
    tokens += sum(answer.life.next_index for answer in answers)
    return WindowEntry(_now_ns(), tokens=tokens, log_bytes=request_size.answer_bytes(answers))


def _refusal(exceeded: Exceeded, choices: Choices) -> HTTPError:
    limit = f"{exceeded.owner} has a limit of {exceeded.limit} {UNITS[exceeded.name]} at this gateway"
    code = "concurrent_requests" if exceeded.name == "concurrent" else exceeded.name
    if exceeded.wait_ns == -1:
        sizes = {
            "tokens_per_minute": request_size.tokens,
            "log_bytes_per_minute": request_size.stored_bytes,
        }
        size = sizes.get(exceeded.name, len)(choices)
        message = f"{limit}, and this request alone needs {size}: send a smaller request"
        return HTTPError(429, message, code=code, headers=FINAL)
    if exceeded.wait_ns is None:
        message = f"{limit}, and all are running: try again once one has ended"
        return HTTPError(429, message, code=code, headers=retry_after_ms(SOON_MS))
    wait_ms = -(-exceeded.wait_ns // rate_window.MS_NS)
    message = f"{limit}, and they are used up: try again in {wait_ms} ms"
    return HTTPError(429, message, code=code, headers=retry_after_ms(wait_ms))


def _now_ns() -> int:
    return int(now_s() * 1e9)
