"""Deliver jobs to a worker: pull a durable consumer's messages as slots become free."""

import json
import logging
import re
from collections.abc import Awaitable, Callable
from functools import partial

import anyio
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from events.clock import now_s
from events.contracts import ACK_WAIT_S, SECOND_NS
from events.jetstream import wire
from events.jetstream.request_reply import subscribe
from events.log import Job, LogError
from events.subjects import Address, shard_stream

logger = logging.getLogger(__name__)

# A frozen client's outstanding pull holds the next job until ack_wait, and a busy worker's takes a job that
# another would begin at once, so pulls are short. With 0.5 s, a lone stream costs 1.3 to 1.5 times the
# processor time per token, and its first token comes 1 to 2 ms later.
PULL_EXPIRES_S = 2.0

# A pull whose end was lost with a connection is dropped this long after it should have ended.
PULL_GRACE_S = 0.5

# If the consumer has no leader or does not exist, ask again after this pause. After this many refusals,
# create it again.
REFUSED_S = 0.25
REFUSALS_MAX = 8


def consumer(name: str, subject: str) -> dict[str, object]:
    return {
        "durable_name": name,
        "name": name,
        "ack_policy": "explicit",
        "ack_wait": int(ACK_WAIT_S * SECOND_NS),
        "max_deliver": -1,
        "max_ack_pending": -1,
        "max_waiting": 4096,
        "deliver_policy": "all",
        "replay_policy": "instant",
        "filter_subject": subject,
    }


def is_ack(ack: str, of: Address) -> bool:
    """Return whether an ack is of a queue. It is published to, so nothing else may be in it."""
    queue = re.escape(f"$JS.ACK.{shard_stream(of.shard)}.worker-{of.model}")
    return re.fullmatch(rf"{queue}(\.[0-9]{{1,20}}){{5}}", ack, re.ASCII) is not None


def given_back(delay_s: float) -> bytes:
    """Return the answer to a job that is delivered again after `delay_s`."""
    return b'-NAK {"delay": %d}' % int(delay_s * SECOND_NS) if delay_s else b"-NAK"


class _Pull:
    """One outstanding request for jobs at a time, with its own inbox, because a job does not name its pull.

    `left` is the number of jobs that it may still bring before `expires_at_s`.
    """

    def __init__(self, inbox: str, take: Callable[["_Pull", Msg], None]) -> None:
        self.inbox = inbox
        self.left = 0
        self.expires_at_s = 0.0
        self.take = partial(take, self)


class Jobs:
    """Hand out deliveries, never more than the worker asked for."""

    def __init__(
        self,
        client: Client,
        api: Callable[[str], Awaitable[object]],
        stream: str,
        consumer: str,
        *,
        create: Callable[[], Awaitable[object]],
    ) -> None:
        self.epoch = 0
        self._client = client
        self._api = api
        self._create = create
        self._refusals = 0
        self._not_before = 0.0
        self._next = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._pulls: list[_Pull] = []
        self._subscriptions: list[Subscription] = []
        self._wanted = 0
        self._received: list[Job] = []
        self._wake = anyio.Event()

    async def open(self) -> None:
        await self._create()

    async def close(self) -> None:
        """Give back what was not handed out, also the jobs that the broker sends before it learns of this."""
        if self._client.is_closed:
            return
        try:
            if self._client.is_connected:
                for subscription in self._subscriptions:
                    # `unsubscribe` would drop what is still on its way, and the client's own drain pings the
                    # broker before this is sent.
                    await self._client._send_unsubscribe(subscription._id)
                await self._api("INFO")
        except LogError as error:
            logger.warning("jobs on their way are delivered again after %g s: %s", ACK_WAIT_S, error)
        finally:
            for subscription in self._subscriptions:
                await subscription.unsubscribe()
            for job in self._received:
                await self._client.publish(job.ack, b"-NAK")

    def want(self, slots: int) -> None:
        self._wanted = slots
        self._wake.set()

    def interrupt(self) -> None:
        """Drop every outstanding pull: they were lost with the connection."""
        self.epoch += 1
        for pull in self._pulls:
            pull.left = 0
        self._wake.set()

    def _on_message(self, pull: _Pull, message: Msg) -> None:
        status = wire.status(message)
        if status is None:
            deliveries, stored, _ = wire.delivered(message)
            self._received.append(Job(stored, message.reply, deliveries, self.epoch))
            pull.left = max(0, pull.left - 1)
        elif status != wire.HEARTBEAT:
            pull.left = 0
            if status not in wire.PULL_ENDED:
                self._refusals += 1
                self._not_before = now_s() + REFUSED_S
        self._wake.set()

    def __aiter__(self) -> "Jobs":
        return self

    async def __anext__(self) -> Job:
        while not self._received:
            self._wake = anyio.Event()
            await anyio.sleep(max(0.0, self._not_before - now_s()))
            await self._recreate()
            await self._pull()
            if not self._received:
                with anyio.move_on_after(PULL_EXPIRES_S):
                    await self._wake.wait()
        self._refusals = 0
        self._wanted -= 1
        return self._received.pop(0)

    async def _recreate(self) -> None:
        """Create the consumer again if it keeps refusing; it then delivers unacknowledged jobs again."""
        if self._refusals >= REFUSALS_MAX:
            self._refusals = 0
            try:
                await self._create()
            except LogError as error:
                logger.warning("could not recreate the consumer: %s", error)

    async def _pull(self) -> None:
        at_s = now_s()
        for pull in self._pulls:
            if pull.expires_at_s < at_s:
                pull.left = 0
        batch = self._wanted - sum(pull.left for pull in self._pulls)
        if batch <= 0 or not self._client.is_connected:
            return
        pull = next((pull for pull in self._pulls if not pull.left), None) or await self._new_pull()
        pull.left = batch
        pull.expires_at_s = at_s + PULL_EXPIRES_S + PULL_GRACE_S
        ask = {"batch": batch, "expires": int(PULL_EXPIRES_S * SECOND_NS)}
        await self._client.publish(self._next, json.dumps(ask).encode(), reply=pull.inbox)

    async def _new_pull(self) -> _Pull:
        """Add a pull. There are never more pulls than slots, since each asks for at least one job."""
        pull = _Pull(self._client.new_inbox(), self._on_message)
        self._subscriptions.append(await subscribe(self._client, pull.inbox, pull.take))
        self._pulls.append(pull)
        return pull
