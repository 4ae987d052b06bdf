"""History: what some subjects hold up to a target, by pulls of a short-lived consumer.

A read that has not seen its target is not finished: in a cluster a reader on a follower can miss
messages that were already acknowledged.
"""

import json
from collections.abc import AsyncIterator, Sequence

import anyio
from nats.aio.client import Client
from nats.aio.msg import Msg

from events.jetstream import wire
from events.jetstream.follower import Api
from events.log import LogError, Stored

# One pull asks for so many messages: a few hundred kilobytes.
BATCH = 500

# A whole day's log of one lane is read in seconds; past this the broker is not answering.
TIMEOUT_S = 30.0

# How long one pull may take, and how long to wait where a follower does not have the target yet.
PULL_S = 2.0
LAG_S = 0.05

INACTIVE_S = 10


async def scan(
    client: Client, api: Api, stream: str, subjects: Sequence[str], *, first: int, target: int
) -> AsyncIterator[Sequence[Stored]]:
    first = max(first, 1)
    if target < first:
        return
    consumer = client.new_inbox().rpartition(".")[2]
    request = wire.reader(stream, consumer, subjects, after=first - 1, inactive_s=INACTIVE_S)
    await api(f"CONSUMER.CREATE.{stream}.{consumer}", request)
    try:
        deadline = anyio.current_time() + TIMEOUT_S
        position = 0
        while position < target:
            batch = await _pull(client, f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}")
            if anyio.current_time() > deadline:
                raise LogError(f"{stream}: sequence {target} could not be read in {TIMEOUT_S} s")
            if not batch:
                await anyio.sleep(LAG_S)
                continue
            position = batch[-1].sequence
            yield [stored for stored in batch if stored.sequence <= target]
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(1):
            await client.publish(f"$JS.API.CONSUMER.DELETE.{stream}.{consumer}")


async def _pull(client: Client, subject: str) -> list[Stored]:
    """Return what the consumer has now, at most BATCH messages."""
    inbox = client.new_inbox()
    received: list[Stored] = []
    done = anyio.Event()

    async def on_message(message: Msg) -> None:
        if wire.status(message) is None:
            received.append(wire.delivered(message)[1])
            if len(received) == BATCH:
                done.set()
        else:
            done.set()

    subscription = await client.subscribe(inbox, cb=on_message)
    try:
        await client.publish(subject, json.dumps({"batch": BATCH, "no_wait": True}).encode(), reply=inbox)
        with anyio.move_on_after(PULL_S):
            await done.wait()
    finally:
        await subscription.unsubscribe()
    return received
