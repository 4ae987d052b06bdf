"""One HTTP request as it went: its route, outcome, owner, tokens and times, for metrics and logs."""

import logging
from collections.abc import Callable, Sequence

import msgspec

from events.clock import now_s
from events.contracts import SECOND_NS

logger = logging.getLogger(__name__)


class Exchange(msgspec.Struct, gc=False):
    """One HTTP request. Whoever learns a field sets it; an unknown text is "", an unknown number 0.

    `route` is `METHOD /template`, "" if no route matched. `status` is that of the answer, 0 if the client
    left before it began, and `code` the error code of an answer from 400 on. `account` is None until the key
    is authenticated; `model` is a served one. `request_id` is set if the request is stored or asks for a
    stored one, and the tokens if its answer was delivered. Times are Unix nanoseconds by the broker's clock;
    `began_s` is when it began by our own. `client` is the address that the request came from.
    """

    started_ns: int
    began_s: float = 0.0
    route: str = ""
    status: int = 0
    code: str = ""
    account: str | None = None
    model: str = ""
    request_id: str = ""
    client_request_id: str = ""
    first_token_ns: int = 0
    ended_ns: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    client: str = ""


# Called once for each exchange, at its end, on the event loop: within microseconds, and without waiting.
Observer = Callable[[Exchange], None]


class Exchanges:
    """Begins exchanges, and hands each to all observers at its end. One that raises harms no other."""

    def __init__(self, now_ns: Callable[[], int], observers: Sequence[Observer] = ()) -> None:
        self._now_ns = now_ns
        self._observers = list(observers)
        self._failed: set[int] = set()

    def begin(self) -> Exchange:
        return Exchange(self._now_ns(), now_s())

    def end(self, exchange: Exchange) -> None:
        took_ns = int((now_s() - exchange.began_s) * SECOND_NS)
        # The broker's clock may step, and is 0 until a record is read.
        exchange.started_ns = exchange.started_ns or max(0, self._now_ns() - took_ns)
        exchange.ended_ns = exchange.started_ns + took_ns
        for at, observe in enumerate(self._observers):
            try:
                observe(exchange)
            except Exception:
                if at not in self._failed:
                    self._failed.add(at)
                    logger.exception("an observer of requests failed; further failures are not logged")

    def refused(self, status: int, code: str) -> None:
        """Note an answer that the server sent before, or instead of, the app."""
        exchange = self.begin()
        exchange.status = status
        exchange.code = code
        self.end(exchange)
