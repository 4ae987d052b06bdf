"""Append messages one by one, or many with one write to disk while many wait at once.

The broker's answer, a time limit or the loss of the connection settles a message. `begin` reports that where
it happens, and `append` to the task that waits.

nats-server writes and syncs each message separately. It syncs an atomic batch to its stream once, but stages
it in a folder first, which takes as long as five messages. So only a crowd is worth a batch.
"""

import logging
from asyncio import TimerHandle, get_running_loop
from collections.abc import Callable, Sequence
from typing import NamedTuple

import anyio
import msgspec
import nats.errors
from nats.aio.msg import Msg

from events import subjects
from events.append_health import AppendHealth
from events.contracts import MESSAGE_BYTES_MAX
from events.errors import reason
from events.jetstream import wire
from events.jetstream.direct_client import DirectClient
from events.jetstream.request_reply import Replies
from events.log import (
    APPEND_TIMEOUT_S,
    Conflict,
    LogError,
    LogFull,
    OutcomeUnknown,
    RecordTooLarge,
    Settled,
)
from events.wakeup import Wakeup

logger = logging.getLogger(__name__)

# At most this many single appends to one stream are under way; further ones wait for the next batch.
CROWD = 8

# The broker stages a batch in memory and on disk, so use half of its largest batch and largest message.
BATCH_MESSAGES_MAX = 500
BATCH_BYTES_MAX = MESSAGE_BYTES_MAX // 2

# A larger message is always sent alone: a crowd of them would not fit into one batch.
BATCHED_BYTES_MAX = BATCH_BYTES_MAX // CROWD

ERR_WRONG_LAST_SEQUENCE = (10071, 10164)
ERR_FULL = (10023, 10047, 10077)


class _Refusal(msgspec.Struct):
    err_code: int = 0
    description: str = ""


class _Answer(msgspec.Struct):
    """The broker's answer to an append."""

    stream: str = ""
    seq: int = 0
    error: _Refusal | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode


class _Waiting:
    """A message for the next batch, with its sequence or its error once it is settled."""

    def __init__(self, subject: str, data: bytes) -> None:
        self.subject = subject
        self.data = data
        self.sequence = 0
        self.error: LogError | None = None

    @property
    def is_settled(self) -> bool:
        return bool(self.sequence or self.error)


class _Stream:
    """The appends under way to one stream."""

    def __init__(self, name: str) -> None:
        self.prefix = subjects.prefix(name)
        self.alone = 0
        self.none_alone = Wakeup()
        self.waiting: list[_Waiting] = []
        self.batching = anyio.Lock()

    @property
    def is_crowded(self) -> bool:
        return self.alone >= CROWD or bool(self.waiting) or self.batching.locked()


class _UnderWay(NamedTuple):
    """An append that was sent: its time limit, and how to end it without an answer."""

    limit: TimerHandle
    abandon: Callable[[], None]


class Appends:
    def __init__(self, client: DirectClient, replies: Replies) -> None:
        self.health = AppendHealth()
        self._client = client
        self._replies = replies
        self._streams: dict[str, _Stream] = {}
        self._under_way: dict[str, _UnderWay] = {}
        self._batches = 0

    def connection_lost(self) -> None:
        """Fail the appends under way: their answers were lost with the connection."""
        for under_way in list(self._under_way.values()):
            under_way.abandon()

    def begin(self, stream: str, subject: str, data: bytes, settled: Settled) -> bool:
        """As `Log.begin_append`."""
        state = self._state(stream)
        bytes_max = min(BATCHED_BYTES_MAX, self._client.max_payload)
        if state.is_crowded or len(data) > bytes_max or not subject.startswith(state.prefix):
            return False

        def settle(outcome: int | LogError) -> None:
            self._leave(state)
            self.health.end(stream, number, outcome if isinstance(outcome, LogError) else None)
            settled(outcome)

        state.alone += 1
        number = self.health.begin(stream)
        reply = self._expect(stream, settle)
        line = f"PUB {subject} {reply} {len(data)}\r\n".encode()
        if not self._client.send(b"".join((line, data, b"\r\n"))):
            self._forget(reply)
            self._leave(state)
            self.health.end(stream, number, LogError("not sent"))
            return False
        return True

    async def append(self, stream: str, subject: str, data: bytes, *, expect_last: int | None) -> int:
        """As `Log.append`."""
        with self.health.measured(stream):
            return await self._append(stream, subject, data, expect_last)

    async def _append(self, stream: str, subject: str, data: bytes, expect_last: int | None) -> int:
        state = self._state(stream)
        if not subject.startswith(state.prefix):
            raise LogError(f"append to {stream}: {subject} belongs to another stream")
        if expect_last is not None or len(data) > BATCHED_BYTES_MAX:
            return await self._append_alone(stream, subject, data, expect_last)
        if state.is_crowded:
            return await self._append_with_others(stream, state, _Waiting(subject, data))
        state.alone += 1
        try:
            return await self._append_alone(stream, subject, data)
        finally:
            self._leave(state)

    def _state(self, stream: str) -> _Stream:
        if (state := self._streams.get(stream)) is None:
            state = self._streams[stream] = _Stream(stream)
        return state

    def _leave(self, state: _Stream) -> None:
        state.alone -= 1
        if not state.alone:
            state.none_alone.set()

    async def _append_with_others(self, stream: str, state: _Stream, message: _Waiting) -> int:
        state.waiting.append(message)
        try:
            async with state.batching:
                while not message.is_settled:
                    while state.alone:
                        await state.none_alone.wait()
                    # The batch holds messages of other callers, so our cancellation must not stop it.
                    with anyio.CancelScope(shield=True):
                        await self._append_batch(stream, _next_batch(state.waiting))
        finally:
            if message in state.waiting:
                state.waiting.remove(message)
        if message.error is not None:
            raise message.error
        return message.sequence

    async def _append_batch(self, stream: str, batch: Sequence[_Waiting]) -> None:
        """Settle all messages: store them together, or one by one if the broker refuses the batch."""
        try:
            if len(batch) > 1 and await self._commit_all(stream, batch):
                return
            for message in batch:
                try:
                    message.sequence = await self._append_alone(stream, message.subject, message.data)
                except OutcomeUnknown:
                    raise
                except LogError as error:
                    message.error = error
        except OutcomeUnknown as error:
            _fail(batch, error)
        finally:
            # If we were ended early, no caller may believe that its message was stored.
            _fail(batch, OutcomeUnknown(f"append to {stream}: abandoned before the broker answered"))

    async def _commit_all(self, stream: str, batch: Sequence[_Waiting]) -> bool:
        """Return False if nothing was stored. Raises OutcomeUnknown."""
        try:
            last = await self._commit(stream, batch)
        except OutcomeUnknown:
            raise
        except LogError as error:
            logger.info("%s refused a batch, so its messages are appended one by one: %s", stream, error)
            return False
        for distance, message in enumerate(reversed(batch)):
            message.sequence = last - distance
        return True

    async def _commit(self, stream: str, batch: Sequence[_Waiting]) -> int:
        """Return the sequence of the last message; the others come directly before it."""
        self._batches += 1
        name = f"{self._replies.inbox.rpartition('.')[2]}-{self._batches}"
        headers = [
            {"Nats-Batch-Id": name, "Nats-Batch-Sequence": str(number)} for number in range(1, len(batch) + 1)
        ]
        headers[-1]["Nats-Batch-Commit"] = "1"
        try:
            for message, head in zip(batch[:-1], headers[:-1], strict=True):
                await self._client.publish(message.subject, message.data, headers=head)
        except nats.errors.MaxPayloadError as error:
            raise RecordTooLarge("a message of the batch is larger than the broker's limit") from error
        except (nats.errors.Error, OSError) as error:
            raise OutcomeUnknown(f"append to {stream}: {reason(error)}") from error
        return await self._stored(stream, batch[-1].subject, batch[-1].data, headers[-1])

    async def _append_alone(
        self, stream: str, subject: str, data: bytes, expect_last: int | None = None
    ) -> int:
        headers = None
        if expect_last is not None:
            headers = {"Nats-Expected-Last-Subject-Sequence": str(expect_last)}
        return await self._stored(stream, subject, data, headers)

    async def _stored(self, stream: str, subject: str, data: bytes, headers: dict[str, str] | None) -> int:
        outcomes: list[int | LogError] = []
        is_settled = anyio.Event()

        def settle(outcome: int | LogError) -> None:
            outcomes.append(outcome)
            is_settled.set()

        reply = self._expect(stream, settle)
        try:
            await self._client.publish(subject, data, reply=reply, headers=headers)
            await is_settled.wait()
        except nats.errors.MaxPayloadError as error:
            raise RecordTooLarge(
                f"a record of {len(data)} bytes is larger than the broker's limit"
            ) from error
        except (nats.errors.Error, OSError) as error:
            raise OutcomeUnknown(f"append to {stream}: {reason(error)}") from error
        finally:
            self._forget(reply)
        (outcome,) = outcomes
        if isinstance(outcome, LogError):
            raise outcome
        return outcome

    def _expect(self, stream: str, settled: Settled) -> str:
        """Return the subject for the broker's answer to an append. `settled` is called at most once."""

        def settle(outcome: int | LogError) -> None:
            self._forget(reply)
            settled(outcome)

        def abandon() -> None:
            settle(OutcomeUnknown(f"append to {stream}: no answer, or the connection was lost"))

        reply = self._replies.expect(lambda message: settle(_outcome(stream, message)))
        limit = get_running_loop().call_later(APPEND_TIMEOUT_S, abandon)
        self._under_way[reply] = _UnderWay(limit, abandon)
        return reply

    def _forget(self, reply: str) -> None:
        if (under_way := self._under_way.pop(reply, None)) is not None:
            under_way.limit.cancel()
            self._replies.forget(reply)


def _outcome(stream: str, answer: Msg) -> int | LogError:
    if wire.status(answer) == wire.NO_RESPONDERS:
        return OutcomeUnknown(f"append to {stream}: no stream answers")
    try:
        decoded = _decode_answer(answer.data)
    except msgspec.DecodeError as error:
        return OutcomeUnknown(f"append to {stream}: the broker's answer cannot be read: {error}")
    if (refusal := decoded.error) is None:
        if decoded.stream != stream:
            return LogError(f"append to {stream}: stream {decoded.stream} took it: its subjects are wrong")
        return decoded.seq
    code = refusal.err_code
    kind = Conflict if code in ERR_WRONG_LAST_SEQUENCE else LogFull if code in ERR_FULL else LogError
    return kind(f"append to {stream}: {refusal.description}")


def _fail(batch: Sequence[_Waiting], error: LogError) -> None:
    """Settle the messages that are not settled yet."""
    for message in batch:
        if not message.is_settled:
            message.error = error


def _next_batch(waiting: list[_Waiting]) -> Sequence[_Waiting]:
    """Remove the oldest messages from the list: at least one, at most as many as a batch may hold."""
    size = 0
    for count, message in enumerate(waiting):
        size += len(message.data)
        if count == BATCH_MESSAGES_MAX or (size > BATCH_BYTES_MAX and count):
            batch = waiting[:count]
            waiting[:] = waiting[count:]
            return batch
    batch = waiting[:]
    waiting[:] = []
    return batch
