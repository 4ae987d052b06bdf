"""Who may ask for what: a key's account, a model that can answer, a queue and a log with room.

Everything that is refused is refused here, before anything is stored.
"""

import contextlib
import logging
from collections.abc import Collection
from functools import partial
from typing import Literal

import anyio

from events import subjects
from events.book import Book
from events.fleet import Fleet
from events.log import Log, LogError
from events.schema import KeyIssued
from rift import keys
from rift.catalogue import Catalogue
from rift.gateway.admission.book_freshness import BookFreshness
from rift.gateway.admission.rate_limits import SOON_MS, RateLimits
from rift.gateway.admission.rate_window import may_wait
from rift.gateway.asgi.errors import HTTPError, retry_after, retry_after_ms
from rift.gateway.asgi.request import Request
from rift.gateway.dialects.sampling import ParsedRequest
from rift.gateway.streams.lane_reader import LaneReader

logger = logging.getLogger(__name__)

# Requests of one model that wait here for a worker. Past this the wait is minutes, and a refusal kinder.
QUEUE_MAX = 1000

# What they may hold: a thirty-second of the smallest log.
QUEUE_BYTES_MAX = 128 * 1024 * 1024

# What of a queue may be one account's, where the book says nothing else. Who has half of it has half of the
# slots soon, so that another waits more than twice as long; with a third, not twice, if that one by itself
# keeps a round of the slots waiting.
QUEUE_SHARE_PERCENT = 33
# Each account may have half a round of the model's slots waiting, whatever its share; while no replica is
# ready, and so the slots are not known, this many.
FREE_COLD = 16

Scope = Literal["inference", "usage"]
CHALLENGE = [(b"www-authenticate", b"Bearer")]

# The log's room below which nothing new is accepted: 64 requests of 8 MB, and all their answers.
LOG_ROOM_BYTES_MIN = 64 * 1024 * 1024
ROOM_CHECK_S = 1.0


class Admission:
    def __init__(
        self,
        log: Log,
        relay: LaneReader,
        *,
        book: Book,
        following: BookFreshness,
        limiting: RateLimits,
        fleet: Fleet,
        models: Catalogue,
        served: Collection[str],
        shard: int,
    ) -> None:
        self._log = log
        self._relay = relay
        self._following = following
        self.limiting = limiting
        self._book = book
        self._fleet = fleet
        self._models = models
        self._served = served
        self._stream = subjects.shard_stream(shard)
        self._has_room = True
        self.stopping = False

    async def watch_room(self) -> None:
        """Keep an eye on the log's room for as long as the gateway lives."""
        while True:
            # A log that does not answer is noticed by `is_connected` and by the append.
            with contextlib.suppress(LogError):
                self._has_room = await self._log.room_bytes(self._stream) > LOG_ROOM_BYTES_MIN
            await anyio.sleep(ROOM_CHECK_S)

    def authenticate(self, request: Request, scope: Scope | None = "inference") -> KeyIssued:
        """Return the key that the request shows, if it is good for `scope` (None: for anything). Raises
        HTTPError (401, 403, 503)."""
        self.check_book()
        scheme, _, key = (request.header(b"authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            message = "no API key: send the header `Authorization: Bearer rift_…`"
            raise HTTPError(401, message, code="missing_api_key", headers=CHALLENGE)
        held = self._book.authenticate(key.strip())
        if held is None:
            if not keys.is_well_formed(key.strip()):
                logger.info("a key was refused that was mistyped or cut: its checksum does not fit")
            raise HTTPError(401, "this API key is not valid here", code="invalid_api_key", headers=CHALLENGE)
        issued = held.event
        self.check_key(issued.key)
        if scope is not None and not {scope, "admin"} & set(issued.scopes):
            message = f"this API key is not for {scope}; its scopes are {', '.join(issued.scopes)}"
            raise HTTPError(403, message, code="insufficient_scope")
        request.key = issued.key
        request.limits = partial(self.limiting.headers, issued.account, issued.key)
        return issued

    def check_book(self) -> None:
        """Raises HTTPError (503) where the book cannot be followed: a key may have been revoked since."""
        if not self._following.is_fresh:
            message = "this gateway cannot read who may do what; try again, or elsewhere"
            raise HTTPError(503, message, code="book_unavailable", headers=retry_after(2))

    def check_key(self, key: str) -> None:
        """Raises HTTPError (401) for a key that is revoked, or expired by the broker's time as known here."""
        state = self._book.keys[key].state(max(self._book.at_ns, self._relay.clock.now_ns()))
        if state != "valid":
            raise HTTPError(401, f"this API key is {state}", code=f"{state}_api_key", headers=CHALLENGE)

    def may_use(self, model: str, key: str) -> bool:
        models = self._book.keys[key].event.models
        return models is None or model in models

    def serves(self, model: str) -> bool:
        """Say whether a request for the model is taken: by a replica that runs, or one that it starts."""
        return model in self._served or self._fleet.can_serve(model)

    def admit(self, wanted: ParsedRequest, account: str, key: str) -> None:
        """Raises HTTPError."""
        self.check_key(key)
        model = self._models.get(wanted.model)
        price = self._book.price(wanted.model)
        if model is None or price is None:
            listed = [name for name in self._models if self._book.price(name)]
            known = ", ".join(name for name in listed if self.may_use(name, key))
            message = f"model {wanted.model!r} is not known here; known: {known}"
            raise HTTPError(404, message, code="model_not_found", param="model")
        self.check_model(wanted.model, key)
        if not self.serves(wanted.model):
            message = (
                f"nothing serves {wanted.model} now; name it in rift.toml as [scale.{wanted.model!r}], "
                f"or start it with `rift worker --model {wanted.model}`"
            )
            raise HTTPError(503, message, code="model_unavailable", param="model", headers=retry_after(30))
        limit = wanted.parameters.max_tokens
        if limit is not None and limit > model.context_tokens:
            param = wanted.max_tokens_param
            message = f"{param} is {limit}; the context of {wanted.model} is {model.context_tokens} tokens"
            raise HTTPError(400, message, code="max_tokens_too_large", param=param)
        if self._book.credits.of(account).plan == "per_second" and price.second_nanousd is None:
            message = f"account {account} is on the plan per_second, and {wanted.model} has no price a second"
            raise HTTPError(400, message, code="plan_without_price", param="model")
        self._check_room()
        self._check_queue(wanted, account)

    def check_model(self, model: str, key: str) -> None:
        """Raises HTTPError (403) for a model that the key is not for."""
        if not self.may_use(model, key):
            message = f"this API key is not for {model}; see /v1/models"
            raise HTTPError(403, message, code="model_not_allowed", param="model")

    def _check_room(self) -> None:
        if self.stopping:
            raise HTTPError(
                503, "this gateway stops; try again", code="gateway_stopping", headers=retry_after(1)
            )
        if not self._log.is_connected:
            raise HTTPError(
                503, "the log does not answer; try again", code="log_unavailable", headers=retry_after(2)
            )
        if not self._has_room:
            raise HTTPError(
                503, "the log is nearly full; try again later", code="log_full", headers=retry_after(60)
            )

    def _check_queue(self, wanted: ParsedRequest, account: str) -> None:
        """A queue has an end, and where there are several accounts none takes all of it."""
        model = wanted.model
        queued, held_bytes = self._relay.queue.length(model)
        if queued >= QUEUE_MAX or held_bytes >= QUEUE_BYTES_MAX:
            message = f"too many requests wait for {model}; try again once some have begun"
            raise HTTPError(429, message, code="queue_full", headers=retry_after(5))
        if len(self._book.accounts) < 2:
            return
        limits = self._book.limits.get(account)
        share = (limits and limits.queue_share_percent) or QUEUE_SHARE_PERCENT
        mine, my_bytes = self._relay.queue.length(model, account)
        free = self._free(model, others=queued - mine)
        fits = may_wait(mine=mine, waiting=queued, more=wanted.choices, free=free, share_percent=share)
        if not fits or 100 * my_bytes >= share * QUEUE_BYTES_MAX:
            # What others have waiting is nobody's business.
            message = (
                f"{mine} requests of account {account} wait for {model}: as many as may be one account's "
                f"now, with a share of {share} % of the queue; try again once some have begun"
            )
            raise HTTPError(429, message, code="queue_share", headers=retry_after_ms(SOON_MS))

    def _free(self, model: str, *, others: int) -> int:
        """Return how many requests each account may have waiting for a model here, whatever its share."""
        gateways = len(self.limiting.lanes)
        if not self._fleet.is_ready(model):
            return max(1, FREE_COLD // gateways)
        slots = self._fleet.slots(model) // gateways
        # What slots are idle are soon taken, by the others' first.
        idle = max(0, slots - self._relay.running(model) - others)
        return max(1, -(-slots // 2) + idle)
