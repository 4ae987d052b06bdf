"""Who may ask for what: a key's account, a model that can answer, a queue and a log with room.

Everything that is refused is refused here, before anything is stored.
"""

import contextlib
import logging
from collections.abc import Collection

import anyio

from events import subjects
from events.book import Book
from events.fleet import Fleet
from events.log import Log, LogError
from events.schema import KeyIssued
from rift import keys
from rift.catalogue import Catalogue
from rift.gateway.http import Refusal, Request
from rift.gateway.parse import Wanted
from rift.gateway.relay import Relay

logger = logging.getLogger(__name__)

# Requests of one model that wait here for a worker. Past this the wait is minutes, and a refusal kinder.
QUEUE_MAX = 1000

# What they may hold of prompts: a thirty-second of the smallest log.
QUEUE_BYTES_MAX = 128 * 1024 * 1024

# The log's room below which nothing new is accepted: 64 requests of 8 MB, and all their answers.
LOG_ROOM_BYTES_MIN = 64 * 1024 * 1024
ROOM_CHECK_S = 1.0


class Admission:
    def __init__(
        self,
        log: Log,
        relay: Relay,
        *,
        book: Book,
        fleet: Fleet,
        models: Catalogue,
        served: Collection[str],
        shard: int,
    ) -> None:
        self._log, self._relay = log, relay
        self._book, self._fleet, self._models, self._served = book, fleet, models, served
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

    def authenticate(self, request: Request) -> KeyIssued:
        challenge = [(b"www-authenticate", b"Bearer")]
        scheme, _, key = (request.header(b"authorization") or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            message = "no API key: send the header `Authorization: Bearer rift_…`"
            raise Refusal(401, message, code="missing_api_key", headers=challenge)
        issued = self._book.authenticate(key.strip())
        if issued is None:
            if not keys.is_well_formed(key.strip()):
                logger.info("a key was refused that was mistyped or cut: its checksum does not fit")
            raise Refusal(401, "this API key is not valid here", code="invalid_api_key", headers=challenge)
        return issued

    def serves(self, model: str) -> bool:
        """Say whether a request for the model is taken: by a replica that runs, or one that it starts."""
        return model in self._served or self._fleet.can_serve(model)

    def admit(self, wanted: Wanted, account: str) -> None:
        """Raises Refusal."""
        model, price = self._models.get(wanted.model), self._book.price(wanted.model)
        if model is None or price is None:
            known = ", ".join(name for name in self._models if self._book.price(name))
            message = f"model {wanted.model!r} is not known here; known: {known}"
            raise Refusal(404, message, code="model_not_found", param="model")
        if not self.serves(wanted.model):
            message = (
                f"nothing serves {wanted.model} now; name it in rift.toml as [scale.{wanted.model!r}], "
                f"or start it with `rift worker --model {wanted.model}`"
            )
            raise Refusal(503, message, code="model_unavailable", param="model", headers=retry_after(30))
        limit = wanted.parameters.max_tokens
        if limit is not None and limit > model.context_tokens:
            param = "parameters.max_tokens" if wanted.kind == "inference" else "max_tokens"
            message = f"{param} is {limit}; the context of {wanted.model} is {model.context_tokens} tokens"
            raise Refusal(400, message, code="max_tokens_too_large", param=param)
        if self._book.credits.of(account).plan == "per_second" and price.second_nanousd is None:
            message = f"account {account} is on the plan per_second, and {wanted.model} has no price a second"
            raise Refusal(400, message, code="plan_without_price", param="model")
        self._check_room(wanted.model)

    def _check_room(self, model: str) -> None:
        if self.stopping:
            raise Refusal(
                503, "this gateway stops; try again", code="gateway_stopping", headers=retry_after(1)
            )
        if not self._log.is_connected:
            raise Refusal(
                503, "the log does not answer; try again", code="log_unavailable", headers=retry_after(2)
            )
        if not self._has_room:
            raise Refusal(
                503, "the log is nearly full; try again later", code="log_full", headers=retry_after(60)
            )
        queued, prompt_bytes = self._relay.queue(model)
        if queued >= QUEUE_MAX or prompt_bytes >= QUEUE_BYTES_MAX:
            message = (
                f"{queued} requests with {prompt_bytes} bytes of prompts wait for {model}; the limit is "
                f"{QUEUE_MAX} requests or {QUEUE_BYTES_MAX} bytes"
            )
            raise Refusal(429, message, code="queue_full", headers=retry_after(5))


def retry_after(seconds: int) -> list[tuple[bytes, bytes]]:
    return [(b"retry-after", str(seconds).encode()), (b"retry-after-ms", str(seconds * 1000).encode())]
