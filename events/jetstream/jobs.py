"""A worker's deliveries: a durable consumer's messages, pulled as slots are free."""

import json
import logging
from collections.abc import Awaitable, Callable

import anyio
from nats.aio.client import Client
from nats.aio.msg import Msg

from events.jetstream import wire
from events.jetstream.replies import subscribe
from events.log import Job, LogError

logger = logging.getLogger(__name__)

# A frozen client's outstanding pull swallows the next job until ack_wait: so pulls are short.
PULL_EXPIRES_S = 2.0

# A pull whose end was lost with a connection is forgotten so long after it should have ended.
PULL_GRACE_S = 0.5

# What an ended pull did not bring.
PENDING_HEADER = "Nats-Pending-Messages"

# A pull's end in order: no messages, expired. Any other but 100, a heartbeat, is a consumer without a
# leader, or none.
ENDED = ("404", "408")
REFUSED_S = 0.25
REFUSALS_MAX = 8

# Long enough for a slow fsync, short enough that a frozen worker's job is taken over soon.
ACK_WAIT_S = 5.0


def consumer(name: str, subject: str) -> dict[str, object]:
    return {
        "durable_name": name,
        "name": name,
        "ack_policy": "explicit",
        "ack_wait": int(ACK_WAIT_S * wire.NANOSECONDS),
        "max_deliver": -1,
        "max_ack_pending": -1,
        "max_waiting": 4096,
        "deliver_policy": "all",
        "replay_policy": "instant",
        "filter_subject": subject,
    }


class Jobs:
    """Hands out deliveries, never more than were wanted."""

    def __init__(
        self, client: Client, stream: str, consumer: str, *, create: Callable[[], Awaitable[object]]
    ) -> None:
        self.epoch = 0
        self._client, self._create = client, create
        self._refusals = 0
        self._not_before = 0.0
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._inbox = client.new_inbox()
        self._pulls: dict[str, tuple[int, float]] = {}
        self._awaited = 0
        self._count = 0
        self._wanted = 0
        self._received: list[Job] = []
        self._wake = anyio.Event()

    async def open(self) -> None:
        await self._create()
        self._subscription = await subscribe(self._client, f"{self._inbox}.*", self._on_message)

    async def close(self) -> None:
        if self._client.is_closed:
            return
        await self._subscription.unsubscribe()
        for job in self._received:
            await self._client.publish(job.ack, b"-NAK")

    def want(self, slots: int) -> None:
        self._wanted = slots
        self._wake.set()

    def interrupt(self) -> None:
        """The connection was lost, and every outstanding pull with it."""
        self.epoch += 1
        self._pulls.clear()
        self._awaited = 0
        self._wake.set()

    def _on_message(self, message: Msg) -> None:
        status = wire.status(message)
        if status is None:
            deliveries, stored, _ = wire.delivered(message)
            self._received.append(Job(stored, message.reply, deliveries, self.epoch))
            self._awaited = max(0, self._awaited - 1)
        elif status != "100":
            if status not in ENDED:
                self._refusals += 1
                self._not_before = anyio.current_time() + REFUSED_S
            if self._pulls.pop(message.subject, None) is not None:
                never_came = (message.headers or {}).get(PENDING_HEADER)
                self._awaited = max(0, self._awaited - int(never_came or 0))
        self._wake.set()

    def __aiter__(self) -> "Jobs":
        return self

    async def __anext__(self) -> Job:
        while not self._received:
            self._wake = anyio.Event()
            await anyio.sleep(max(0.0, self._not_before - anyio.current_time()))
            await self._recreate()
            await self._pull()
            if not self._received:
                with anyio.move_on_after(PULL_EXPIRES_S):
                    await self._wake.wait()
        self._refusals = 0
        self._wanted -= 1
        return self._received.pop(0)

    async def _recreate(self) -> None:
        """A consumer that answers nothing is made again; what was not acknowledged comes again with it."""
        if self._refusals >= REFUSALS_MAX:
            self._refusals = 0
            try:
                await self._create()
            except LogError as error:
                logger.warning("the consumer could not be made again: %s", error)

    async def _pull(self) -> None:
        now = anyio.current_time()
        self._pulls = {pull: asked for pull, asked in self._pulls.items() if asked[1] > now}
        # A job does not say which pull it is for, and the broker serves them in turn: only the sum is known.
        # An end that was lost is made up for once all pulls of its time are forgotten.
        self._awaited = min(self._awaited, sum(asked for asked, _ in self._pulls.values()))
        batch = self._wanted - self._awaited
        if batch <= 0 or not self._client.is_connected:
            return
        self._count += 1
        reply = f"{self._inbox}.{self._count}"
        self._pulls[reply] = (batch, now + PULL_EXPIRES_S + PULL_GRACE_S)
        self._awaited += batch
        ask = {"batch": batch, "expires": int(PULL_EXPIRES_S * wire.NANOSECONDS)}
        await self._client.publish(self._next, json.dumps(ask).encode(), reply=reply)
