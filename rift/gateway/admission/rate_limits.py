"""The limits of accounts and keys at this gateway: taken before a request is appended, counted once it has
ended. The rules are in `limits.py`; what must not live here is money (`allowances.py`)."""

import anyio

from events.book import Book
from events.schema import RequestAccepted
from rift.catalogue import OUTPUT_TOKENS_DEFAULT
from rift.gateway.admission import max_cost, rate_window
from rift.gateway.admission.live_gateways import LiveGateways
from rift.gateway.admission.rate_window import Part, RateWindow, Refused, Taken
from rift.gateway.asgi.errors import FINAL, Headers, HTTPError, retry_after_ms
from rift.gateway.choices import Choices
from rift.gateway.completion import Completion
from rift.gateway.streams.lane_reader import LaneReader
from rift.gateway.streams.subscription import Subscription

# Bytes of a prompt that are one token, about, in most languages and tokenizers.
TOKEN_BYTES = 4

# A hint where nobody can know: a short answer ends within this.
SOON_MS = 1000

WORDS = {
    "requests_per_minute": "requests a minute",
    "tokens_per_minute": "tokens a minute",
    "concurrent": "requests at once",
}


class RateLimits:
    """Implements `reservation.Limit`. A limit is divided among `gateways`."""

    def __init__(self, lane: LaneReader, *, book: Book, gateways: LiveGateways) -> None:
        self._lane = lane
        self._book = book
        self._gateways = gateways
        self._limiter = RateWindow()
        self._taken: dict[str, Taken] = {}
        self._watchers: dict[str, Subscription] = {}

    async def reserve(self, choices: Choices) -> Choices:
        """Count the requests against their limits. Raises HTTPError (429): then nothing is counted."""
        first = choices[0]
        if parts := self._parts(first.account, first.key):
            taken = self._limiter.take(parts, _now_ns(), requests=len(choices), tokens=_estimate(choices))
            if isinstance(taken, Refused):
                raise _refusal(taken, choices)
            self._taken[first.request] = taken
        return choices

    def follow(self, choices: Choices) -> None:
        """Replace the estimate by what the requests used, once they have ended on the own lane."""
        if choices[0].request in self._taken:
            answers = [Completion.of(accepted, self._book, keep_text=False) for accepted in choices]
            watcher = self._watchers[choices[0].request] = Subscription(answers, on_end=self._at_end)
            self._lane.join(watcher)

    def release(self, choices: Choices) -> None:
        """Count nothing for requests that are not accepted."""
        if (taken := self._forget(choices)) is not None:
            rate_window.undo(taken)

    def unknown(self, choices: Choices) -> None:
        """Count the estimate for requests that may run elsewhere, but not as concurrent."""
        if (taken := self._forget(choices)) is not None:
            rate_window.end(taken, tokens=None)

    def _forget(self, choices: Choices) -> Taken | None:
        request = choices[0].request
        if (watcher := self._watchers.pop(request, None)) is not None:
            self._lane.close(watcher)
        return self._taken.pop(request, None)

    def headers(self, account: str, key: str) -> Headers:
        """Return what an answer says of its limits, at the moment at which it is sent."""
        parts = self._parts(account, key)
        now_ns = _now_ns()
        usages = {whose: (of, self._limiter.usage(whose, now_ns)) for whose, of in parts.items()}
        return rate_window.headers(usages, now_ns)

    def _parts(self, account: str, key: str) -> dict[str, Part]:
        held = self._book.limits_of(account, key)
        if not held:
            return {}
        living = len(self._gateways)
        parts = {whose: rate_window.part(of, living) for whose, of in held.items()}
        return {whose: of for whose, of in parts.items() if of != Part()}

    def _at_end(self, watcher: Subscription) -> None:
        request = watcher.answer.id
        self._watchers.pop(request, None)
        if (taken := self._taken.pop(request, None)) is not None:
            rate_window.end(taken, tokens=_tokens(watcher))


def _estimate(group: Choices) -> int:
    """Return about how many tokens a group takes: its prompt once, and as much output as it may have."""
    prompt = -(-max_cost.prompt_bytes(group[0]) // TOKEN_BYTES)
    return prompt + len(group) * _output_max(group[0])


def _output_max(accepted: RequestAccepted) -> int:
    return accepted.parameters.max_tokens or min(OUTPUT_TOKENS_DEFAULT, accepted.prompt_tokens_max)


def _tokens(stream: Subscription) -> int:
    """Return how many tokens there were: of a group the prompt once, as on the bill."""
    lives = [answer.life for answer in stream.answers.values()]
    return max(life.prompt_tokens for life in lives) + sum(life.next_index for life in lives)


def _refusal(refused: Refused, group: Choices) -> HTTPError:
    what = f"{refused.whose} has {refused.limit} {WORDS[refused.what]} at this gateway"
    code = "concurrent_requests" if refused.what == "concurrent" else refused.what
    if refused.wait_ns == -1:
        asked = _estimate(group) if refused.what == "tokens_per_minute" else len(group)
        message = f"{what}, and this request alone takes {asked}: ask for less"
        return HTTPError(429, message, code=code, headers=FINAL)
    if refused.wait_ns is None:
        message = f"{what}, and they are under way: try again once one has ended"
        return HTTPError(429, message, code=code, headers=retry_after_ms(SOON_MS))
    wait_ms = -(-refused.wait_ns // rate_window.MS_NS)
    message = f"{what}, and they are used up: there is room again in {wait_ms} ms"
    return HTTPError(429, message, code=code, headers=retry_after_ms(wait_ms))


def _now_ns() -> int:
    return int(anyio.current_time() * 1e9)
