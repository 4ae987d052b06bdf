"""API keys: which key a request shows, whether it is valid, and which models it may use."""

import logging
from functools import partial
from typing import Literal

from events.book import Book
from events.broker_clock import BrokerClock
from events.schema import KeyIssued
from rift import keys
from rift.gateway.admission.book_freshness import BookFreshness
from rift.gateway.admission.rate_limits import RateLimits
from rift.gateway.asgi.errors import HTTPError, retry_after
from rift.gateway.asgi.request import Request
from rift.gateway.asgi.tally import Tally

logger = logging.getLogger(__name__)

Scope = Literal["inference", "usage"]
CHALLENGE = [(b"www-authenticate", b"Bearer")]


class UnknownKeys:
    """Counts the requests whose key is unknown, for the log."""

    def __init__(self) -> None:
        self._tally = Tally()

    def count(self, key: str) -> None:
        kinds = ["unknown"] if keys.is_well_formed(key) else ["unknown", "mistyped"]
        if counts := self._tally.add(*kinds):
            logger.info(
                "refused %d requests with an unknown key; %d of these keys were mistyped or cut off: their "
                "checksum does not match",
                counts["unknown"],
                counts["mistyped"],
            )


class Authenticator:
    def __init__(
        self, book: Book, freshness: BookFreshness, rate_limits: RateLimits, clock: BrokerClock
    ) -> None:
        self._book = book
        self._freshness = freshness
        self._rate_limits = rate_limits
        self._clock = clock
        self._unknown_keys = UnknownKeys()

    def authenticate(self, request: Request, scope: Scope | None = "inference") -> KeyIssued:
        """Return the key of a request if it is valid for `scope` (None: any).

        Raises HTTPError (401, 403, 503).
        """
        self.check_book()
        scheme, _, key = (request.header(b"authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            message = "no API key: send the header `Authorization: Bearer rift_…`"
            raise HTTPError(401, message, code="missing_api_key", headers=CHALLENGE)
        entry = self._book.authenticate(key.strip())
        if entry is None:
            self._unknown_keys.count(key.strip())
            raise HTTPError(401, "this API key is not valid here", code="invalid_api_key", headers=CHALLENGE)
        issued = entry.event
        self.check_key(issued.key)
        request.exchange.account = issued.account
        if scope is not None and not {scope, "admin"} & set(issued.scopes):
            message = f"this API key is not for {scope}; its scopes are {', '.join(issued.scopes)}"
            raise HTTPError(403, message, code="insufficient_scope")
        request.key = issued.key
        request.limits = partial(self._rate_limits.headers, issued.account, issued.key)
        return issued

    def check_book(self) -> None:
        """Raise HTTPError (503) if the book may be out of date: a key may have been revoked since."""
        if not self._freshness.is_fresh:
            message = "this gateway cannot read keys and limits; try again, or another gateway"
            raise HTTPError(503, message, code="book_unavailable", headers=retry_after(2))

    def check_key(self, key: str) -> None:
        """Raise HTTPError (401) if a key is revoked, or expired by the broker's clock."""
        state = self._book.keys[key].state(max(self._book.at_ns, self._clock.now_ns()))
        if state != "valid":
            raise HTTPError(401, f"this API key is {state}", code=f"{state}_api_key", headers=CHALLENGE)

    def may_use(self, model: str, key: str) -> bool:
        models = self._book.keys[key].event.models
        return models is None or model in models

    def check_model(self, model: str, key: str) -> None:
        """Raise HTTPError (403) if a key is not for a model."""
        if not self.may_use(model, key):
            message = f"this API key is not for {model}; see /v1/models"
            raise HTTPError(403, message, code="model_not_allowed", param="model")
