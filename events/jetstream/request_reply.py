"""Requests and their answers: one inbox for all answers, and no task between the socket and the waiter.

The client library hands a subscription's messages to a task through a queue, which takes three turns of the
event loop for each message. If the subscription has a *future*, the library calls `set_result` at once for
every message. A `Sink` is such a future.
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
    """Pass each message of a subscription to `take`, which must not raise: it runs in the socket's reader."""

    def __init__(self, take: Callable[[Msg], None]) -> None:
        self.set_result = take

    def cancelled(self) -> bool:
        return False


async def subscribe(client: Client, subject: str, take: Callable[[Msg], None]) -> Subscription:
    return await client.subscribe(subject, future=cast(Any, Sink(take)))


class Replies:
    """The requests of one connection; each gets one answer or none."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.inbox = ""
        self._count = 0
        self._waiting: dict[str, Callable[[Msg], None]] = {}

    async def open(self) -> None:
        self.inbox = self._client.new_inbox()
        await subscribe(self._client, f"{self.inbox}.*", self._take)

    def _take(self, message: Msg) -> None:
        if (take := self._waiting.pop(message.subject, None)) is not None:
            take(message)

    def expect(self, take: Callable[[Msg], None]) -> str:
        """Return a new subject, whose first message goes to `take`, unless it is forgotten before."""
        self._count += 1
        reply = f"{self.inbox}.{self._count}"
        self._waiting[reply] = take
        return reply

    def forget(self, reply: str) -> None:
        self._waiting.pop(reply, None)

    async def ask_within(self, timeout_s: float, subject: str, data: bytes) -> Msg:
        """As `ask`. Raises TimeoutError that names the time after `timeout_s`."""
        with anyio.move_on_after(timeout_s):
            return await self.ask(subject, data)
        raise TimeoutError(f"none within {timeout_s:g} s")

    async def ask(self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None) -> Msg:
        """Return the answer, without a time limit. Raises nats.errors.Error, OSError."""
        answers: list[Msg] = []
        answered = anyio.Event()

        def take(message: Msg) -> None:
            answers.append(message)
            answered.set()

        reply = self.expect(take)
        try:
            await self._client.publish(subject, data, reply=reply, headers=cast(Any, headers))
            await answered.wait()
        finally:
            self.forget(reply)
        (answer,) = answers
        if wire.status(answer) == wire.NO_RESPONDERS:
            raise nats.errors.NoRespondersError
        return answer
