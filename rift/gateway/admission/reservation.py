"""The resources of a request before it is accepted: a queue place, rate limits, credit and a content key.

    reserved    after `reserve`: all are taken, and nothing is appended
    followed    after `follow`: the own lane's reader follows the requests, and their acceptances are appended
    ended       after `commit`, `release` or `outcome_unknown`

No other code takes these resources or gives them back.
"""

from collections.abc import Sequence
from typing import Protocol

from msgspec.structs import replace

from events import encryption, subjects
from events.log import Log, LogFull
from rift.gateway.asgi.errors import HTTPError, retry_after
from rift.gateway.choices import Choices
from rift.gateway.state import GatewayConfig
from rift.gateway.streams.lane_reader import LaneReader
from rift.gateway.streams.subscription import Subscription


class Limit(Protocol):
    """A limit from which a request, or a group of choices, reserves a part before it is accepted."""

    async def reserve(self, choices: Choices) -> Choices:
        """Reserve a part, and return the acceptances with its reference in them.

        Raises HTTPError, LogError: then nothing is reserved.
        """

    def follow(self, choices: Choices) -> None:
        """Count the actual usage of requests that the own lane's reader follows, once they have ended."""

    def release(self, choices: Choices) -> None:
        """Give back the part, if there is one: no acceptance is stored or ever will be."""

    def unknown(self, choices: Choices) -> None:
        """Let the log decide what counts: an acceptance may be stored, by this or another gateway."""


class Reservation:
    """Everything that one request, or group, holds. `choices` are the acceptances as they may be appended."""

    def __init__(self, choices: Choices, lane: LaneReader, limits: Sequence[Limit]) -> None:
        self.choices = choices
        self._lane = lane
        self._limits = limits
        self._subscription: Subscription | None = None

    def follow(self, subscription: Subscription) -> None:
        """Follow the requests on the own lane. Call it before the first append, or events are missed."""
        self._lane.open(subscription)
        self._subscription = subscription
        for limit in self._limits:
            limit.follow(self.choices)

    def commit(self) -> None:
        """Keep everything until the requests end: their acceptances are stored."""
        assert self._subscription is not None, "a request is followed before it is appended"
        self._lane.confirm_stored(self._subscription)

    def release(self) -> None:
        """Give back everything: no acceptance is stored or ever will be."""
        self._leave_lane()
        for limit in self._limits:
            limit.release(self.choices)

    def outcome_unknown(self) -> None:
        """Give back the queue place, and let the log decide about the limits."""
        self._leave_lane()
        for limit in self._limits:
            limit.unknown(self.choices)

    def _leave_lane(self) -> None:
        # Once the lane's reader follows a request, the queue place is the reader's.
        if self._subscription is not None:
            self._lane.close(self._subscription)
        else:
            self._lane.queue.remove(self.choices)


class Reservations:
    """Reserve for requests on the own lane."""

    def __init__(self, log: Log, config: GatewayConfig, lane: LaneReader, limits: Sequence[Limit]) -> None:
        self._log = log
        self._config = config
        self._lane = lane
        self._limits = limits

    async def reserve(self, choices: Choices, *, store: bool) -> Reservation:
        """Return a reservation. Without `store` the content key is erased soon after the end.

        Raises HTTPError (402, 429, 503), LogError: then nothing is held.
        """
        self._lane.queue.add(choices)
        try:
            for limit in self._limits:
                choices = await limit.reserve(choices)
            choices = await self._with_content_key(choices, store=store)
        except BaseException:
            Reservation(choices, self._lane, self._limits).release()
            raise
        return Reservation(choices, self._lane, self._limits)

    async def _with_content_key(self, choices: Choices, *, store: bool) -> Choices:
        """Return the acceptances with a key to seal them, if they need one.

        Raises HTTPError (503), LogError.
        """
        if (store and not self._config.seal_content) or choices[0].sealed is not None:
            return choices
        requests = tuple(accepted.request for accepted in choices)
        key = self._config.entropy(encryption.KEY_BYTES)
        subject = subjects.SECRET_KEPT if store else subjects.SECRET_PASSING
        secret = encryption.Secret(requests, key, choices[0].account)
        try:
            sealed = await encryption.keep(self._log, subject, secret)
        except LogFull as error:
            message = "the log can store no more keys of sealed content; try again later"
            raise HTTPError(503, message, code="content_keys_full", headers=retry_after(60)) from error
        return tuple(replace(accepted, sealed=sealed) for accepted in choices)
