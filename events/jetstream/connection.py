"""One connection to JetStream: streams, appends, readers, deliveries, request-reply."""

import base64
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import anyio
import nats.errors
from anyio.abc import TaskGroup
from nats.aio.msg import Msg

from events import subjects as names
from events.jetstream import deliveries, wire
from events.jetstream.appends import Appends
from events.jetstream.deliveries import Jobs
from events.jetstream.direct_client import DirectClient
from events.jetstream.history_scan import first_sequence, scan
from events.jetstream.polling_reader import PollingReader
from events.jetstream.push_reader import LiveSource, PushReader
from events.jetstream.request_reply import Replies
from events.jetstream.streams import InvalidBroker, compare, extended, servers, stream_configs
from events.jetstream.wire import ERR_STREAM_NOT_FOUND, ApiError
from events.log import (
    API_TIMEOUT_S,
    ForeignDelivery,
    LogError,
    NoResponders,
    OutcomeUnknown,
    Settled,
    Stored,
)
from events.wakeup import Wakeup

logger = logging.getLogger(__name__)

Reader = TypeVar("Reader", PushReader, PollingReader, Jobs)

SERVER_VERSION_MIN = (2, 15)

# What the subjects of answers begin with, whoever asks (`access.py`).
INBOX = "_INBOX."

# Closing a reader may take this long before the process continues without it.
CLOSE_S = 1.0
# The pause before a process that answers questions asks again whether the broker knows it.
ANSWER_RETRY_S = 0.5

# A cluster without a leader.
ERR_UNAVAILABLE = 10008
ERR_NO_MESSAGE = 10037
# The sequence has no message; or its message was deleted.
ERR_NO_SUCH_SEQUENCE = (10043, 10057)


class JetStream:
    """`epoch` counts how often the connection was lost; `reconnected` is set when it is there again.

    `hidden` is as in Access.
    """

    def __init__(self, hidden: str = "") -> None:
        self._hidden = hidden
        self.client = DirectClient()
        self.replies = Replies(self.client)
        self._appends = Appends(self.client, self.replies)
        self.epoch = 0
        self.reconnected = Wakeup()
        # While connecting: the number of servers that have not refused yet.
        self.connecting: anyio.CancelScope | None = None
        self.untried = 1
        self.problem: Exception | None = None
        self.reader_gaps = 0
        self._readers: set[PushReader | PollingReader | Jobs] = set()

    @property
    def is_connected(self) -> bool:
        return self.client.is_connected

    @property
    def server_version(self) -> str:
        version = self.client.connected_server_version
        return f"{version.major}.{version.minor}.{version.patch}"

    @property
    def server_id(self) -> str:
        """The id of the server that this connection was last with. A server gets a new one at each start."""
        return str(self.client._server_info.get("server_id", ""))

    @property
    def server_address(self) -> str:
        """Host and port of the server that this connection is with; "" while it is with none."""
        url = self.client.connected_url
        return f"{url.hostname}:{url.port}" if url else ""

    async def close(self) -> None:
        # A lost connection does not take what waits to be sent: the client fails at it with a RuntimeError.
        with suppress(OSError, RuntimeError):
            await self.client.close()
        if (transport := self.client._transport) is not None:
            # The client leaves it open if the connection was refused.
            transport.close()  # type: ignore[no-untyped-call]

    async def on_disconnected(self) -> None:
        self.epoch += 1
        for reader in self._readers:
            reader.interrupt()
        self._appends.connection_lost()

    async def on_reconnected(self) -> None:
        self.reconnected.set()

    async def on_error(self, error: Exception) -> None:
        # While the broker is away, the client fails in the same way ten times a second.
        is_known = not self.is_connected and str(error) == str(self.problem)
        self.problem = error
        if self.connecting is not None:
            self.untried -= 1
            if not self.untried:
                self.connecting.cancel()
        elif not is_known:
            logger.warning("connection to the log: %s", wire.reason(error))

    async def _api(self, path: str, body: Any = None) -> dict[str, Any]:
        data = b"" if body is None else json.dumps(body).encode()
        try:
            reply = await self.replies.ask_within(API_TIMEOUT_S, f"$JS.API.{path}", data)
        except (nats.errors.Error, OSError) as error:
            raise OutcomeUnknown(f"no answer to {path}: {wire.reason(error)}") from error
        answer: dict[str, Any] = json.loads(reply.data)
        if "error" in answer:
            refused = ApiError(path, answer["error"])
            if refused.err_code == ERR_UNAVAILABLE:
                raise OutcomeUnknown(f"no answer to {refused}")
            raise refused
        return answer

    # --- streams -------------------------------------------------------------------------------

    async def ensure_streams(
        self, *, shards: int, replicas: int, max_bytes: int, retention_days: int = 7
    ) -> None:
        """Create missing streams, extend smaller ones, and compare the settings of all.

        Raises InvalidBroker naming a difference.
        """
        version = self.client.connected_server_version
        if (version.major, version.minor) < SERVER_VERSION_MIN:
            raise InvalidBroker(f"nats-server {version} is too old: install 2.15 or newer")
        for config in stream_configs(shards, replicas, max_bytes, retention_days):
            await self._ensure_stream(config["name"], config)

    async def missing_bytes(
        self, *, shards: int, replicas: int, max_bytes: int, retention_days: int = 7
    ) -> int:
        """Return the space of the streams that `ensure_streams` would create. Raises LogError."""
        existing = await self.streams()
        configs = stream_configs(shards, replicas, max_bytes, retention_days)
        return sum(config["max_bytes"] for config in configs if config["name"] not in existing)

    async def compare_streams(
        self, *, shards: int, replicas: int, max_bytes: int, retention_days: int = 7
    ) -> None:
        """As `ensure_streams`, but change nothing. Raises LogError for a missing stream: it is lost."""
        for config in stream_configs(shards, replicas, max_bytes, retention_days):
            name = config["name"]
            if (current := await self._stream(name)) is None:
                raise LogError(
                    f"stream {name} is gone: the broker came back without its records; stop all processes "
                    "and restore its store"
                )
            compare(name, current, config | extended(current, config))

    async def _stream(self, name: str) -> dict[str, Any] | None:
        """Return a stream's settings, or None if there is no such stream."""
        try:
            config: dict[str, Any] = (await self._api(f"STREAM.INFO.{name}"))["config"]
        except ApiError as error:
            if error.err_code != ERR_STREAM_NOT_FOUND:
                raise
            return None
        return config

    async def _ensure_stream(self, name: str, config: dict[str, Any]) -> None:
        current = await self._stream(name) or await self._put_stream("CREATE", name, config)
        beyond = extended(current, config)
        if current != current | beyond:
            current = await self._put_stream("UPDATE", name, current | beyond)
        compare(name, current, config | beyond)

    async def _put_stream(self, verb: str, name: str, config: dict[str, Any]) -> dict[str, Any]:
        try:
            actual: dict[str, Any] = (await self._api(f"STREAM.{verb}.{name}", config))["config"]
        except ApiError as error:
            raise InvalidBroker(
                f"stream {name} of {config['max_bytes']} bytes, {config['num_replicas']} replicas: {error}; "
                "if the disk is smaller, lower log_bytes_max; if there are fewer servers, lower log_replicas"
            ) from error
        return actual

    async def streams(self) -> set[str]:
        # One answer holds 1,024 names, far more than a broker of Rift has.
        return set((await self._api("STREAM.NAMES"))["streams"] or ())

    async def append(self, stream: str, subject: str, data: bytes, *, expect_last: int | None = None) -> int:
        return await self._appends.append(stream, subject, data, expect_last=expect_last)

    def begin_append(self, stream: str, subject: str, data: bytes, settled: Settled) -> bool:
        return self._appends.begin(stream, subject, data, settled)

    @property
    def has_unsent(self) -> bool:
        return self.client.has_unsent

    def unwritable_s(self, stream: str) -> float:
        return self._appends.health.unwritable_s(stream)

    def time_appends(self, took: Callable[[int], None]) -> None:
        self._appends.health.took = took

    async def last_sequence(self, stream: str, subject: str | None = None) -> int:
        if subject is None:
            return int((await self._api(f"STREAM.INFO.{stream}"))["state"]["last_seq"])
        message = await self._last(stream, subject)
        return int(message["seq"]) if message else 0

    async def last(self, stream: str, subject: str) -> Stored | None:
        return _stored(await self._last(stream, subject))

    async def _last(self, stream: str, subject: str) -> dict[str, Any] | None:
        return await self._message(stream, {"last_by_subj": subject})

    async def get(self, stream: str, sequence: int) -> Stored | None:
        return _stored(await self._message(stream, {"seq": sequence}))

    async def erase(self, stream: str, sequence: int) -> None:
        try:
            await self._api(f"STREAM.MSG.DELETE.{stream}", {"seq": sequence})
        except ApiError as error:
            if error.err_code not in ERR_NO_SUCH_SEQUENCE:
                raise

    async def _message(self, stream: str, query: dict[str, Any]) -> dict[str, Any] | None:
        try:
            answer = await self._api(f"STREAM.MSG.GET.{stream}", query)
        except ApiError as error:
            if error.err_code == ERR_NO_MESSAGE:
                return None
            raise
        message: dict[str, Any] = answer["message"]
        return message

    async def first_sequence(self, stream: str) -> int:
        return await first_sequence(self._api, stream)

    async def trim(self, stream: str, up_to: int) -> None:
        # A purge beyond the last sequence would skip numbers, and a purge up to 0 would remove everything.
        up_to = min(up_to, await self.last_sequence(stream))
        if up_to >= await self.first_sequence(stream):
            await self.purge(stream, up_to)

    async def purge(self, stream: str, up_to: int) -> None:
        """Remove the records up to a sequence, and give the next record at least the sequence after it."""
        await self._remove(f"STREAM.PURGE.{stream}", {"seq": up_to + 1})

    async def _remove(self, path: str, body: Any = None) -> None:
        """Make an API call that the broker may hide."""
        await self._api(self._hidden + path, body)

    async def room_bytes(self, stream: str) -> int:
        info = await self._api(f"STREAM.INFO.{stream}")
        return int(info["config"]["max_bytes"]) - int(info["state"]["bytes"])

    async def capacity_bytes(self, stream: str) -> int:
        return int((await self._api(f"STREAM.INFO.{stream}"))["config"]["max_bytes"])

    async def stream_servers(self, stream: str) -> Mapping[str, str]:
        return servers((await self._api(f"STREAM.INFO.{stream}")).get("cluster", {}))

    # --- readers and deliveries ------------------------------------------------------------------

    def _note_gap(self) -> None:
        self.reader_gaps += 1

    @asynccontextmanager
    async def follow(
        self, stream: str, subjects: Sequence[str], *, after: int, pace_s: float = 0.0
    ) -> AsyncIterator[PushReader | PollingReader]:
        if pace_s:
            polling = PollingReader(self.client, self._api, stream, subjects, after, pace_s)
            async with self._open(polling) as follower:
                yield follower
        else:
            async with self._open(
                PushReader(self.client, self._api, LiveSource(stream, subjects, self._note_gap), after)
            ) as live:
                yield live

    def scan(
        self, stream: str, subjects: Sequence[str], *, first: int, target: int
    ) -> AsyncGenerator[Sequence[Stored], None]:
        return scan(self.client, self._api, stream, subjects, first=first, target=target)

    @asynccontextmanager
    async def jobs(self, shard: int, model: str) -> AsyncIterator[Jobs]:
        stream = names.shard_stream(shard)
        consumer = f"worker-{model}"
        subject = names.queue(shard, model)
        config = deliveries.consumer(consumer, subject)

        async def create() -> None:
            request = {"stream_name": stream, "config": config}
            await self._api(f"CONSUMER.CREATE.{stream}.{consumer}.{subject}", request)

        async with self._open(Jobs(self.client, self._api, stream, consumer, create=create)) as jobs:
            yield jobs

    @asynccontextmanager
    async def _open(self, reader: Reader) -> AsyncIterator[Reader]:
        await reader.open()
        self._readers.add(reader)
        try:
            yield reader
        finally:
            self._readers.discard(reader)
            with anyio.CancelScope(shield=True), anyio.move_on_after(CLOSE_S):
                await reader.close()

    async def ack(self, ack: str) -> None:
        await self._answer_job(ack, b"+ACK")

    async def in_progress(self, ack: str) -> None:
        await self._answer_job(ack, b"+WPI")

    async def give_back(self, ack: str, *, delay_s: float = 0.0, of: names.Address | None = None) -> None:
        if of is not None and not deliveries.is_ack(ack, of):
            raise ForeignDelivery(f"{ack[:200]!a} is no delivery of {of.model} in shard {of.shard}")
        await self._answer_job(ack, deliveries.given_back(delay_s))

    async def _answer_job(self, ack: str, word: bytes) -> None:
        """Publish an answer without confirmation: if it is lost, the broker delivers the job again."""
        try:
            await self.client.publish(ack, word)
        except nats.errors.Error as error:
            logger.warning("could not send %s: %s", word.decode(), wire.reason(error))

    # --- request-reply, in no stream ----------------------------------------------------------------

    async def ask(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        try:
            return bytes((await self.replies.ask_within(timeout_s, subject, data)).data)
        except nats.errors.NoRespondersError as error:
            raise NoResponders(f"no process answers {subject}") from error
        except (nats.errors.Error, OSError) as error:
            raise LogError(f"no answer on {subject}: {wire.reason(error)}") from error

    @asynccontextmanager
    async def answer(
        self, subject: str, handler: Callable[[bytes], Awaitable[bytes]], *, concurrent: bool = False
    ) -> AsyncIterator[None]:
        if concurrent:
            async with anyio.create_task_group() as tasks, self._answer(subject, handler, tasks):
                yield
                tasks.cancel_scope.cancel()
        else:
            async with self._answer(subject, handler, None):
                yield

    @asynccontextmanager
    async def _answer(
        self, subject: str, handler: Callable[[bytes], Awaitable[bytes]], tasks: TaskGroup | None
    ) -> AsyncIterator[None]:
        """Answer questions in `tasks`, or one at a time in the client library's task."""

        async def on_message(message: Msg) -> None:
            if not message.reply.startswith(INBOX):
                # Whoever may read can have the broker deliver a record to any subject, even as a question.
                logger.warning("a record came as a question on %s and is not answered", subject)
                return
            try:
                await self.client.publish(message.reply, await handler(message.data))
            except nats.errors.Error as error:
                logger.warning("an answer on %s was lost: %s", subject, wire.reason(error))

        async def start(message: Msg) -> None:
            assert tasks is not None, "only with a task group"
            tasks.start_soon(on_message, message)

        subscription = await self.client.subscribe(subject, cb=on_message if tasks is None else start)
        try:
            # Until the broker has read the subscription, it reports that there are no responders. The
            # client's flush can overtake unsent messages; a request cannot. Brokers that are just back may
            # not answer it, and whoever answers questions must survive that.
            while True:
                try:
                    await self._api("INFO")
                    break
                except LogError as error:
                    if self.client.is_closed:
                        raise
                    logger.warning("questions on %s are not answered yet: %s", subject, error)
                    await anyio.sleep(ANSWER_RETRY_S)
            yield
        finally:
            if not self.client.is_closed:
                # Without this, the broker would keep sending questions to a cancelled handler.
                with anyio.CancelScope(shield=True):
                    await subscription.unsubscribe()


def _stored(message: dict[str, Any] | None) -> Stored | None:
    if message is None:
        return None
    data = base64.b64decode(message.get("data") or "")
    return Stored(message["subject"], int(message["seq"]), wire.unix_ns(message["time"]), data)
