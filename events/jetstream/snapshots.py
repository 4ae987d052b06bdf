"""Copy a whole stream out of a broker, and into another one, by JetStream's snapshot API.

A snapshot holds the stream's messages with their sequences and times up to the moment of the request, and its
consumers with what they acknowledged. Its bytes are the broker's own format: they are only passed on.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg

from events.jetstream import wire
from events.jetstream.request_reply import subscribe
from events.log import LogError
from events.wakeup import Wakeup

if TYPE_CHECKING:
    from events.jetstream.connection import JetStream

# The broker sends 8 MiB ahead of our answers, and gives up if it gets none for 5 s. It sends a chunk at least
# that often unless its disk stalls.
CHUNK_BYTES = 128 * 1024
CHUNK_TIMEOUT_S = 30.0

# After the last chunk the broker writes and syncs the stream, which takes as long as its disk does.
RESTORE_TIMEOUT_S = 3600.0

# The status of a snapshot that is complete. One of less than a chunk has no status.
COMPLETE = (None, "204")


class Snapshot(msgspec.Struct, frozen=True):
    """The stream's settings and state, as the broker states them and takes them back."""

    config: dict[str, Any]
    state: dict[str, Any]

    @property
    def first(self) -> int:
        return int(self.state["first_seq"])

    @property
    def last(self) -> int:
        return int(self.state["last_seq"])


class _Chunks:
    """The chunks of one snapshot, in order. The broker's window bounds how many wait."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._received: list[Msg] = []
        self._came = Wakeup()

    def take(self, message: Msg) -> None:
        self._received.append(message)
        self._came.set()

    async def read(self, stream: str) -> AsyncIterator[bytes]:
        """Yield the chunks, and ask for more as they are taken. Raises LogError."""
        while True:
            pending = self._came.pending
            if not self._received:
                with anyio.move_on_after(CHUNK_TIMEOUT_S):
                    await pending.wait()
            if not self._received:
                raise LogError(f"the snapshot of {stream} stopped: nothing came for {CHUNK_TIMEOUT_S:g} s")
            message = self._received.pop(0)
            if not message.data:
                if (status := wire.status(message)) not in COMPLETE:
                    why = (message.headers or {}).get("Description", "")
                    raise LogError(f"the snapshot of {stream} failed: {status} {why}".rstrip())
                return
            yield message.data
            if message.reply:
                try:
                    await self._client.publish(message.reply, b"")
                except (nats.errors.Error, OSError) as error:
                    why = str(error) or type(error).__name__
                    raise LogError(f"the snapshot of {stream} failed: {why}") from error


async def save(log: "JetStream", stream: str, write: Callable[[bytes], object]) -> Snapshot:
    """Pass a stream's snapshot to `write`, piece by piece. Raises LogError, and what `write` raises."""
    inbox = log.client.new_inbox()
    chunks = _Chunks(log.client)
    subscription = await subscribe(log.client, inbox, chunks.take)
    try:
        request = {"deliver_subject": inbox, "no_consumers": False, "chunk_size": CHUNK_BYTES}
        answer = await log._api(f"STREAM.SNAPSHOT.{stream}", request)
        async for chunk in chunks.read(stream):
            write(chunk)
    finally:
        # Without a receiver, the broker stops.
        with suppress(nats.errors.Error, OSError), anyio.CancelScope(shield=True):
            await subscription.unsubscribe()
    return Snapshot(answer["config"], answer["state"])


async def restore(log: "JetStream", snapshot: Snapshot, pieces: Iterable[bytes]) -> int:
    """Create a stream from a snapshot, and return its last sequence. Raises LogError, also if it exists."""
    stream = snapshot.config["name"]
    answer = await log._api(f"STREAM.RESTORE.{stream}", msgspec.structs.asdict(snapshot))
    subject: str = answer["deliver_subject"]
    try:
        for piece in pieces:
            _check(stream, await log.replies.ask_within(CHUNK_TIMEOUT_S, subject, piece))
        restored = _check(stream, await log.replies.ask_within(RESTORE_TIMEOUT_S, subject, b""))
    except (nats.errors.Error, OSError) as error:
        raise LogError(f"{stream} was not restored: {str(error) or type(error).__name__}") from error
    return int(restored["state"]["last_seq"])


async def skip_to(log: "JetStream", stream: str, sequence: int) -> None:
    """Give the next record of an empty stream the sequence after `sequence`. Raises LogError."""
    await log.purge(stream, sequence)


def _check(stream: str, reply: Msg) -> dict[str, Any]:
    """Return the broker's answer to a piece. Raises LogError."""
    answer: dict[str, Any] = json.loads(reply.data) if reply.data else {}
    if "error" in answer:
        raise LogError(f"{stream} was not restored: {answer['error'].get('description')}")
    return answer
