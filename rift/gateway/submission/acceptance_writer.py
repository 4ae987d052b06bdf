"""Acceptances encrypted and appended, and the end of their reservation."""

from collections.abc import Callable

import anyio
from msgspec.structs import replace

from events import encryption
from events.contracts import ACCEPT_S
from events.log import LogError, LogFull, OutcomeUnknown, RecordTooLarge
from events.publisher import Publisher
from events.schema import RequestAccepted
from rift.gateway.admission.reservation import Reservation
from rift.gateway.asgi.errors import FINAL, HTTPError, retry_after
from rift.gateway.choices import Choices
from rift.gateway.state import GatewayConfig, LogState
from rift.gateway.streams.cancellation import Cancellation
from rift.gateway.streams.log_health import LogHealth
from rift.gateway.streams.subscription import Subscription

# Returns the time since a request arrived.
Age = Callable[[], int]


class AcceptanceWriter:
    def __init__(
        self, state: LogState, config: GatewayConfig, health: LogHealth, cancellation: Cancellation
    ) -> None:
        self._health = health
        self._log = state.log
        self._book = state.book
        self._publisher = Publisher(state.log, config.lane, shard=config.shard)
        self._cancellation = cancellation

    async def accept(self, reservation: Reservation, subscription: Subscription, age_ns: Age) -> None:
        """Follow a new request, then append its acceptances. Raises HTTPError: then nothing is charged."""
        choices = reservation.choices
        reservation.follow(subscription)
        try:
            with self._health.while_writable():
                await self._append(choices, age_ns, subscription)
        except LogError as error:
            refusal = _not_stored(error)
            if refusal.code == "log_unavailable" or len(choices) > 1:
                self._cancellation.cancel_unanswered(choices)
                reservation.outcome_unknown()
            else:
                reservation.release()
            raise refusal from error
        reservation.commit()
        key = choices[0].key
        if self._book.keys[key].revoked_at_ns is not None:
            # A gateway that read the revocation before the acceptance could not cancel the request.
            self._cancellation.revoke(accepted.request for accepted in choices)

    async def complete(self, reservation: Reservation, age_ns: Age) -> None:
        """Append the acceptances of a claimed request that another gateway may append too.

        Raises HTTPError.
        """
        try:
            with self._health.while_writable():
                await self._append(reservation.choices, age_ns)
        except LogError as error:
            raise _not_stored(error) from error
        finally:
            # The log decides whose acceptances count.
            reservation.outcome_unknown()

    def discard(self, choices: Choices) -> None:
        """Cancel as unanswered the requests of an earlier try that failed: a new one replaces them.

        A single request that failed costs nothing anyway.
        """
        if len(choices) > 1:
            self._cancellation.cancel_unanswered(choices)

    async def _append(self, choices: Choices, age_ns: Age, subscription: Subscription | None = None) -> None:
        """Append each acceptance, encrypted if it has a content key. `subscription` gets the same keys.

        Raises LogError: OutcomeUnknown if the outcome of any is unknown.
        """
        failed: list[LogError] = []

        async def append(accepted: RequestAccepted) -> None:
            try:
                cipher = await encryption.cipher_of(self._log, accepted)
                if cipher is None and accepted.sealed is not None:
                    raise encryption.KeyErased(accepted.request)
                if subscription is not None:
                    subscription.decrypt_with(accepted.request, cipher)
                accepted = replace(accepted, admission_ns=age_ns())
                event = accepted if cipher is None else cipher.closed(accepted)
                await self._publisher.publish(event, within_s=ACCEPT_S)
            except LogError as error:
                failed.append(error)

        if len(choices) == 1:
            await append(choices[0])
        else:
            async with anyio.create_task_group() as tasks:
                for accepted in choices:
                    tasks.start_soon(append, accepted)
        if failed:
            raise next((error for error in failed if isinstance(error, OutcomeUnknown)), failed[0])


def _not_stored(error: LogError) -> HTTPError:
    """Return the answer to a client whose acceptance could not be appended."""
    match error:
        case RecordTooLarge():
            return HTTPError(413, f"the request cannot be stored: {error}", code="body_too_large")
        case LogFull():
            message = "the log is full; try again later"
            return HTTPError(503, message, code="log_full", headers=retry_after(60))
        case encryption.KeyErased():
            message = "the content of this request was removed before it was accepted; use a new key"
            return HTTPError(410, message, code="content_removed", headers=FINAL)
    message = "the log does not answer; try again"
    return HTTPError(503, message, code="log_unavailable", headers=retry_after(5))
