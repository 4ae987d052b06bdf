"""Read the messages of some subjects up to a target, with pulls of a short-lived consumer.

A read ends only when it has seen its target: in a cluster, a consumer on a follower can miss messages that
were already acknowledged.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
from nats.aio.client import Client
from nats.aio.msg import Msg

from events.clock import now_s
from events.contracts import SECOND_NS
from events.jetstream import wire
from events.jetstream.push_reader import Api
from events.jetstream.request_reply import subscribe
from events.log import SCAN_TIMEOUT_S, LogError, Stored

# One pull asks for this many messages: a few hundred kilobytes.
BATCH = 500

# One pull carries at most this much, unless a single message is larger: a second of a slow network.
BATCH_BYTES = 16 * 1024 * 1024

# How long one pull may take, and how long to wait for a follower that does not have the target yet.
PULL_S = 2.0
LAG_S = 0.05

INACTIVE_S = 10


async def scan(
    client: Client, api: Api, stream: str, subjects: Sequence[str], *, first: int, target: int
) -> AsyncGenerator[Sequence[Stored], None]:
    position = max(first, 1) - 1
    deadline = now_s() + SCAN_TIMEOUT_S
    while position < target:
        async with _consumer(client, api, stream, subjects, after=position) as name:
            seen = 0
            while position < target:
                batch = await pull(client, name, seen)
                if now_s() > deadline:
                    raise LogError(f"{stream}: sequence {target} was not read within {SCAN_TIMEOUT_S:g} s")
                if batch is None:
                    break
                if not batch:
                    if target < await first_sequence(api, stream):
                        return
                    await anyio.sleep(LAG_S)
                    continue
                seen += len(batch)
                position = batch[-1].sequence
                yield [stored for stored in batch if stored.sequence <= target]


async def first_sequence(api: Api, stream: str) -> int:
    """Return the first sequence that the stream's leader holds; one past the last if it holds none."""
    state = (await api(f"STREAM.INFO.{stream}", None))["state"]
    return int(state["first_seq"]) if state["messages"] else int(state["last_seq"]) + 1


@asynccontextmanager
async def _consumer(
    client: Client, api: Api, stream: str, subjects: Sequence[str], *, after: int
) -> AsyncIterator[str]:
    name = await create(client, api, stream, subjects, after=after)
    try:
        yield name
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(1):
            await delete(client, name)


async def create(client: Client, api: Api, stream: str, subjects: Sequence[str], *, after: int) -> str:
    """Create a consumer that starts after `after`; return `<stream>.<name>`."""
    name = f"{stream}.{client.new_inbox().rpartition('.')[2]}"
    request = wire.reader(stream, name.partition(".")[2], subjects, after=after, inactive_s=INACTIVE_S)
    await api(f"CONSUMER.CREATE.{name}", request)
    return name


async def delete(client: Client, name: str) -> None:
    await client.publish(f"$JS.API.CONSUMER.DELETE.{name}")


async def pull(
    client: Client, name: str, seen: int, *, batch: int = BATCH, wait_s: float = 0.0
) -> list[Stored] | None:
    """Return up to `batch` messages that follow the `seen` which the consumer has delivered.

    If there are none, wait for them up to `wait_s`. Returns None if some may be lost: without
    acknowledgements the consumer would not deliver them again.
    """
    inbox = client.new_inbox()
    received: list[Stored] = []
    gap = False
    done = anyio.Event()

    def on_message(message: Msg) -> None:
        nonlocal gap
        if (status := wire.status(message)) is not None:
            # A missing consumer, or one without a leader, does not prove that there are no messages.
            gap = gap or (status not in wire.PULL_ENDED and not received)
            done.set()
            return
        _, stored, consumer_sequence = wire.delivered(message)
        received.append(stored)
        gap = gap or consumer_sequence != seen + len(received)
        if len(received) == batch:
            done.set()

    subscription = await subscribe(client, inbox, on_message)
    try:
        limit = {"expires": int(wait_s * SECOND_NS)} if wait_s else {"no_wait": True}
        ask = {"batch": batch, "max_bytes": BATCH_BYTES, **limit}
        await client.publish(f"$JS.API.CONSUMER.MSG.NEXT.{name}", json.dumps(ask).encode(), reply=inbox)
        with anyio.move_on_after(PULL_S + wait_s):
            await done.wait()
    finally:
        await subscription.unsubscribe()
    return None if gap or not done.is_set() else received
