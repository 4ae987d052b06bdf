"""A live reader: an ephemeral push consumer that is replaced whenever continuity is in doubt."""

import logging
from asyncio import TimerHandle, get_running_loop
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import anyio
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from events.clock import now_s
from events.contracts import SECOND_NS
from events.jetstream import wire
from events.jetstream.request_reply import subscribe
from events.log import LogError, Stored
from events.wakeup import Wakeup

logger = logging.getLogger(__name__)

# The broker sends a heartbeat to a reader that gets no messages. After two missing ones the reader reopens.
# Heartbeats are a third of the cost of an idle installation.
HEARTBEAT_S = 1.5
SILENCE_S = 3.5

# The broker keeps an unconnected consumer this long: longer than any normal reconnect.
INACTIVE_S = 30

# A reader that cannot reopen tries again this often.
RETRY_S = 0.5

Api = Callable[[str, Any], Awaitable[dict[str, Any]]]


class LiveSource(NamedTuple):
    stream: str
    subjects: Sequence[str]
    # Called when continuity was in doubt, so that records are read again.
    broken: Callable[[], None]


class _Silence:
    """Calls `expired` once nothing was heard for SILENCE_S. One timer serves many messages."""

    def __init__(self, expired: Callable[[], None]) -> None:
        self._expired = expired
        self._heard_at_s = 0.0
        self._timer: TimerHandle | None = None

    def begin(self) -> None:
        self.heard()
        self._check_after(SILENCE_S)

    def heard(self) -> None:
        self._heard_at_s = now_s()

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _check_after(self, seconds: float) -> None:
        self._timer = get_running_loop().call_later(seconds, self._check)

    def _check(self) -> None:
        left_s = self._heard_at_s + SILENCE_S - now_s()
        if left_s > 0:
            self._check_after(left_s)
        else:
            self._expired()


class PushReader:
    """Hand out every stored message of its subjects once, in order."""

    def __init__(self, client: Client, api: Api, source: LiveSource, after: int) -> None:
        self.position = after
        self._client = client
        self._api = api
        self._source = source
        self._subscription: Any = None
        self._consumer = ""
        self._next = 1
        self._batch: list[Stored] = []
        self._flow: list[str] = []
        self._broken: str | None = None
        self._wake = Wakeup()
        self._silence = _Silence(self._on_silence)

    async def open(self) -> None:
        self._consumer = self._client.new_inbox().rpartition(".")[2]
        self._next = 1
        self._broken = None
        self._batch = []
        self._flow = []
        inbox = self._client.new_inbox()
        self._subscription = await subscribe(self._client, inbox, self._on_message)
        request = wire.reader(
            self._source.stream,
            self._consumer,
            self._source.subjects,
            after=self.position,
            inactive_s=INACTIVE_S,
            deliver_subject=inbox,
            flow_control=True,
            idle_heartbeat=int(HEARTBEAT_S * SECOND_NS),
        )
        await self._api(f"CONSUMER.CREATE.{self._source.stream}.{self._consumer}", request)
        self._silence.begin()

    async def close(self) -> None:
        self._silence.end()
        subscription = self._subscription
        self._subscription = None
        if subscription is not None and not self._client.is_closed:
            await subscription.unsubscribe()
            await self._client.publish(f"$JS.API.CONSUMER.DELETE.{self._source.stream}.{self._consumer}")

    def interrupt(self) -> None:
        """Reopen the consumer: messages may have been lost with the connection."""
        self._break("connection lost")
        self._wake.set()

    def hurry(self) -> None:
        """Do nothing: a push reader has no pace."""

    def _break(self, why: str) -> None:
        self._broken = self._broken or why

    def _on_silence(self) -> None:
        self._break("silence")
        self._wake.set()

    def _on_message(self, message: Msg) -> None:
        self._silence.heard()
        if wire.status(message) is None:
            _, stored, consumer_sequence = wire.delivered(message)
            if consumer_sequence != self._next:
                self._break(f"gap: expected message {self._next} of the consumer, got {consumer_sequence}")
            elif self._broken is None:
                self._next += 1
                self._batch.append(stored)
        else:
            self._on_control(message)
        self._wake.set()

    def _on_control(self, message: Msg) -> None:
        headers = message.headers or {}
        if message.reply:
            self._flow.append(message.reply)
        elif (last := headers.get("Nats-Last-Consumer")) and int(last) != self._next - 1:
            self._break(f"gap: the consumer has sent {last} messages, {self._next - 1} arrived")
        if stalled := headers.get("Nats-Consumer-Stalled"):
            self._flow.append(stalled)

    def __aiter__(self) -> "PushReader":
        return self

    async def __anext__(self) -> Sequence[Stored]:
        while True:
            while self._flow:
                await self._client.publish(self._flow.pop(0))
            if self._batch:
                batch = self._batch
                self._batch = []
                self.position = batch[-1].sequence
                return batch
            if self._broken is not None:
                # Records may arrive before it returns.
                await self._reopen(self._broken)
            else:
                await self._wake.wait()

    async def _reopen(self, why: str) -> None:
        """Replace the consumer, however long it takes, and continue after `position`."""
        subjects = ", ".join(self._source.subjects)
        logger.warning(
            "%s (%s): %s; reads on after sequence %d", self._source.stream, subjects, why, self.position
        )
        self._source.broken()
        while True:
            try:
                await self.close()
                await self.open()
                return
            except (LogError, nats.errors.Error) as error:
                logger.warning("%s: %s", self._source.stream, error)
                await anyio.sleep(RETRY_S)
