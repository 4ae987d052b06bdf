"""Whether a new request is admitted: its key, model and price, a queue and a log with room.

Everything is refused here or by a reservation, before anything is stored.
"""

from contextlib import AbstractContextManager

from rift.gateway.admission.auth import Authenticator
from rift.gateway.admission.log_room import LogRoom
from rift.gateway.admission.queue_share import QueueShare
from rift.gateway.admission.request_size import check_fits, check_record
from rift.gateway.admission.reservation import Reservation, Reservations
from rift.gateway.asgi.errors import HTTPError, retry_after
from rift.gateway.choices import Choices, by_prompt
from rift.gateway.dialects.sampling import ParsedRequest
from rift.gateway.state import GatewayConfig, LogState


class Admission:
    def __init__(
        self,
        state: LogState,
        config: GatewayConfig,
        auth: Authenticator,
        room: LogRoom,
        queue: QueueShare,
        reservations: Reservations,
    ) -> None:
        self.auth = auth
        self._book = state.book
        self._fleet = state.fleet
        self._config = config
        self._room = room
        self._queue = queue
        self._reservations = reservations

    async def reserve(self, parsed: ParsedRequest, choices: Choices) -> Reservation:
        """Admit a new request, and reserve its resources.

        Raises HTTPError, LogError: then nothing is reserved.
        """
        self._admit(parsed, choices)
        for prompt in by_prompt(choices):
            check_record(prompt[0], sealed=self._config.seal_content or not parsed.store)
        # Without a pause in between, or requests that come at once would not count each other.
        with self.while_writable():
            return await self._reservations.reserve(choices, store=parsed.store)

    def while_writable(self) -> AbstractContextManager[None]:
        """Raise OutcomeUnknown in the block as soon as the log is seen to store nothing."""
        return self._room.health.while_writable()

    def check_model(self, model: str, key: str) -> None:
        """Raise HTTPError (403, 404) unless the model is known and the key may use it."""
        if model not in self._config.models:
            self.auth.check_key(key)
            raise self._unknown_model(model, key)
        self.auth.check_model(model, key)

    def serves(self, model: str) -> bool:
        """Return whether a replica runs for a model, or is started for a request."""
        return model in self._config.served or self._fleet.can_serve(model)

    def _admit(self, parsed: ParsedRequest, choices: Choices) -> None:
        account, key = choices[0].account, choices[0].key
        self.auth.check_key(key)
        model = self._config.models.get(parsed.model)
        price = self._book.price(parsed.model)
        if model is None or price is None:
            raise self._unknown_model(parsed.model, key)
        self.auth.check_model(parsed.model, key)
        if not self.serves(parsed.model):
            message = (
                f"nothing serves {parsed.model} now; add [scale.{parsed.model!r}] to rift.toml, or start a "
                f"replica with `rift worker --model {parsed.model}`"
            )
            raise HTTPError(503, message, code="model_unavailable", param="model", headers=retry_after(30))
        check_fits(parsed, model)
        if self._book.credits.of(account).plan == "per_second" and price.second_nanousd is None:
            message = (
                f"account {account} is on the plan per_second, and {parsed.model} has no price per second"
            )
            raise HTTPError(400, message, code="plan_without_price", param="model")
        self._room.check()
        self._queue.check(parsed.model, account, len(choices))

    def _unknown_model(self, model: str, key: str) -> HTTPError:
        priced = [name for name in self._config.models if self._book.price(name)]
        known = ", ".join(name for name in priced if self.auth.may_use(name, key))
        none = "none for this key" if priced else "none, because no price list is in force"
        message = f"model {model!r} is not known here; known: {known or none}"
        return HTTPError(404, message, code="model_not_found", param="model")
