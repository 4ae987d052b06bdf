"""What this connection asks for and is told: one inbox for all answers, and no task between the socket
and who waits.

The client library hands a subscription's messages to a task of its own through a queue; that is three
turns of the event loop for each. A subscription with a *future* is told at once instead, as often as
there are messages, and that is all a `Sink` is.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import anyio
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from events.jetstream import wire


class Sink:
    """Takes each message of a subscription in turn. `take` must not raise: it runs in the socket's reader."""

    def __init__(self, take: Callable[[Msg], None]) -> None:
        self.set_result = take

    def cancelled(self) -> bool:
        return False


async def subscribe(client: Client, subject: str, take: Callable[[Msg], None]) -> Subscription:
    return await client.subscribe(subject, future=cast(Any, Sink(take)))


class _Waiting:
    def __init__(self) -> None:
        self.answered = anyio.Event()
        self.answer: Msg | None = None


class Replies:
    """Requests of one connection, each answered once or not at all."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.inbox = ""
        self._count = 0
        self._waiting: dict[str, _Waiting] = {}

    async def open(self) -> None:
        self.inbox = self._client.new_inbox()
        await subscribe(self._client, f"{self.inbox}.*", self._take)

    def _take(self, message: Msg) -> None:
        if (waiting := self._waiting.get(message.subject)) is not None:
            waiting.answer = message
            waiting.answered.set()

    async def ask(self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None) -> Msg:
        """Return the answer, however long it takes. Raises nats.errors.Error, OSError."""
        self._count += 1
        reply = f"{self.inbox}.{self._count}"
        waiting = self._waiting[reply] = _Waiting()
        try:
            await self._client.publish(subject, data, reply=reply, headers=cast(Any, headers))
            await waiting.answered.wait()
        finally:
            del self._waiting[reply]
        assert waiting.answer is not None, "it was told"
        if wire.status(waiting.answer) == wire.NO_RESPONDERS:
            raise nats.errors.NoRespondersError
        return waiting.answer
