"""From the log to a client: the whole answer, or frames as they come; and what is said when it goes.

the client goes    routes that can resume wait out a grace, in which any gateway may say
                   `ClientAttached`; then, and elsewhere at once, the request is cancelled
a detached request (in the background, or with an idempotency key) goes on without a client
"""

import logging
from collections.abc import Iterable

import anyio
from anyio.abc import TaskGroup

from events import codec, subjects
from events.book import Book
from events.ids import parse_request_id
from events.log import Log, LogError, append_until_known
from events.schema import AnyEvent, CancelReason, CancelRequested, ClientAttached, Problem
from rift.gateway.asgi.cors import server_timing
from rift.gateway.asgi.errors import FINAL, Headers, HTTPError, retry_after
from rift.gateway.asgi.request import Request
from rift.gateway.choices import Choices
from rift.gateway.dialects import dialect as dialects
from rift.gateway.streams.lane_reader import LaneReader, Subscription
from rift.gateway.streams.queue_status import KEEP_ALIVE_S, STATUS_S, QueueStatus, Status, StatusNotices

logger = logging.getLogger(__name__)

# Until then a worker's refusal can still be a status code of its own.
STATUS_LINE_S = 1.0

# How long a native stream's client may be away. A client that resumed says so three times as often.
GRACE_S = 15.0
ATTACHED_S = GRACE_S / 3

# Who was told that a request was not accepted must not be charged: that is said for this long.
SAY_S = 300.0
SAY_AGAIN_S = 1.0

# A publish can land after its sender gave up on it, by as long as a connection takes to come back.
LATE_LANDING_S = (0.0, 5.0, 30.0)

# To a format that does not tell one wait from another.
ANY = Status("queued")

# What would end the same again: it stopped its engine three times, or cannot be read, now or any more.
ENDS_AGAIN = ("poison", "prompt_unreadable", "content_removed")

STOPPING = Problem(
    code="gateway_stopping", message="this gateway stops; resume the stream, or fetch the answer"
)
REVOKED = Problem(code="revoked_api_key", message="the key that this was read with was revoked")
SSE_HEADERS = [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]


class Delivery:
    """`tasks` outlives each client: it says what must be said after one has gone. `stopping`: the gateway
    goes, and its lane's loss says the rest."""

    def __init__(self, log: Log, *, writer: str, book: Book, waiting: QueueStatus, tasks: TaskGroup) -> None:
        self._log = log
        self._writer = writer
        self._book = book
        self._waiting = waiting
        self._tasks = tasks
        self._reading: dict[Subscription, str] = {}
        self.stopping = False

    async def deliver(
        self,
        request: Request,
        relay: LaneReader,
        stream: Subscription,
        *,
        resumed: bool,
        headers: Headers = (),
    ) -> None:
        """Answer with what the log says. Raises HTTPError for a failure before the first byte."""
        refusal: HTTPError | None = None
        send = self._send_frames if stream.format else self._send_whole
        self._reading[stream] = request.key
        if self._book.keys[request.key].revoked_at_ns is not None:
            # Since it was authenticated: who heard of it could not know of this stream.
            self.revoke(request.key, ())
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._watch, request, tasks.cancel_scope)
                tasks.start_soon(self._stay_attached, stream, resumed)
                refusal = await send(request, relay, stream, headers, resumed)
                tasks.cancel_scope.cancel()
        finally:
            del self._reading[stream]
            relay.taken(stream)
            stream.let_client_go()
            if stream.ended or self.stopping:
                relay.close(stream)
            elif stream.answer.accepted.detached:
                self._tasks.start_soon(self._end_rest, stream)
                self.mind(relay, stream)
            else:
                self._tasks.start_soon(self._client_gone, relay, stream, resumed)
        if refusal is not None:
            raise refusal

    def mind(self, relay: LaneReader, stream: Subscription) -> None:
        """Follow a request without a client to its end."""

        async def follow() -> None:
            await stream.wait_for_end()
            relay.close(stream)

        self._tasks.start_soon(follow)

    def cancel_unanswered(self, group: Choices) -> None:
        """Say, now and twice later, that what was stored, or may still land, must not be answered."""

        async def say() -> None:
            for pause_s in LATE_LANDING_S:
                await anyio.sleep(pause_s)
                for accepted in group:
                    await self.say_cancel(accepted.request, "unanswered")

        self._tasks.start_soon(say)

    def revoke(self, key: str, requests: Iterable[str]) -> None:
        """End what was accepted under a key that is revoked, and what is read with it of its account's."""
        for request in requests:
            self._tasks.start_soon(self.say_cancel, request, "revoked")
        for stream, reader in self._reading.items():
            if reader == key and stream.answer.accepted.key != key:
                stream.break_off(REVOKED)

    async def say_cancel(self, request: str, why: CancelReason) -> None:
        parsed = parse_request_id(request)
        assert parsed is not None, "an accepted request has an id"
        event = CancelRequested(request=request, why=why)
        await self._say(subjects.cancel(parsed.at), parsed.at.shard, event)

    # --- sending -------------------------------------------------------------------------------------

    async def _watch(self, request: Request, scope: anyio.CancelScope) -> None:
        await request.disconnected()
        scope.cancel()

    async def _send_whole(
        self, request: Request, relay: LaneReader, stream: Subscription, headers: Headers, resumed: bool
    ) -> HTTPError | None:
        """Answer with the whole object once the request has ended; return a failure instead."""
        await stream.wait_for_end()
        if stream.broken is REVOKED:
            return failed(401, REVOKED)
        if stream.open_requests() and stream.failure() is None:
            message = f"this gateway stops; fetch the answer at /v1/inference/{stream.answer.id}"
            return HTTPError(503, message, code=STOPPING.code, headers=retry_after(1))
        if failure := stream.failure():
            return failed(*failure)
        timed = [*headers, *server_timing(stream.answer.timing())]
        dialect = dialects.of(stream.answer.accepted.kind)
        await request.answer(200, dialect.whole(list(stream.answers.values())), timed)
        return None

    async def _send_frames(
        self, request: Request, relay: LaneReader, stream: Subscription, headers: Headers, resumed: bool
    ) -> HTTPError | None:
        """Send frames as the log brings them; return a failure that comes before the first."""
        assert stream.format is not None, "a stream has a format"
        if not resumed:
            with anyio.move_on_after(STATUS_LINE_S):
                await stream.moved.wait()
            if stream.ended and (failure := stream.failure()):
                return failed(*failure)
        timed = [*headers, *server_timing(stream.answer.timing())]
        await request.start(200, b"text/event-stream", [*SSE_HEADERS, *timed])
        stream.sent_at = anyio.current_time()
        notices = StatusNotices()
        while True:
            if stream.is_waiting:
                await self._tell_status(request, stream, notices)
            look_at = stream.sent_at + KEEP_ALIVE_S
            if stream.is_waiting and stream.format.tells_status:
                look_at = anyio.current_time() + STATUS_S
            with anyio.move_on_at(look_at):
                await stream.wait(request.write_chunk)
            if stream.has_news:
                more = not stream.ended
                data = stream.take()
                relay.taken(stream)
                await request.write(data, more=more)
                if not more:
                    return None
            elif not stream.is_waiting and anyio.current_time() >= stream.sent_at + KEEP_ALIVE_S:
                stream.sent_at = anyio.current_time()
                await request.write(stream.format.keep_alive, more=True)

    async def _tell_status(self, request: Request, stream: Subscription, notices: StatusNotices) -> None:
        """Tell what the request waits for, if that is news or nothing was said for long."""
        assert stream.format is not None, "a stream has a format"
        status = self._waiting.status(stream.answer.accepted.model)
        shown = status if stream.format.tells_status else ANY
        if notices.due(shown, now := anyio.current_time()):
            stream.sent_at = now
            await request.write(stream.format.waiting(status.name, status.estimate_ms), more=True)

    # --- a client that went, or came back -----------------------------------------------------------------

    async def _client_gone(self, relay: LaneReader, stream: Subscription, resumed: bool) -> None:
        """Wait for the client where it can resume, then end the request on its behalf."""
        accepted = stream.answer.accepted
        needed = relay.has_client(accepted.request)
        if resumed or (dialects.of(accepted.kind).is_resumable and accepted.stream):
            with anyio.move_on_after(GRACE_S):
                await stream.wait_for_end(or_attached=True)
                needed = True
        relay.close(stream)
        if stream.failure() is not None:
            await self._end_rest(stream)
        elif not needed and not relay.has_client(accepted.request):
            for answer in stream.open_requests():
                await self.say_cancel(answer.id, "disconnect")

    async def _end_rest(self, stream: Subscription) -> None:
        """Where one choice failed, the client was told so, and pays for none that goes on."""
        if stream.failure() is not None:
            for answer in stream.open_requests():
                await self.say_cancel(answer.id, "unanswered")

    async def _stay_attached(self, stream: Subscription, resumed: bool) -> None:
        """Say that a client is here, so that no gateway takes its absence elsewhere for the end: who
        resumed at once, who was here first as soon as there are others."""
        if not resumed:
            await stream.wait_for_company()
        accepted = stream.answer.accepted
        parsed = parse_request_id(accepted.request)
        assert parsed is not None, "an accepted request has an id"
        subject = subjects.lane(parsed.at.shard, parsed.at.lane)
        while not accepted.detached:
            await self._say(subject, parsed.at.shard, ClientAttached(request=accepted.request))
            await anyio.sleep(ATTACHED_S)

    async def _say(self, subject: str, shard: int, event: AnyEvent) -> None:
        data = codec.encode(self._writer, [event])
        stream = subjects.shard_stream(shard)
        with anyio.move_on_after(SAY_S) as timer:
            while True:
                try:
                    await append_until_known(self._log, stream, subject, data, within_s=SAY_S)
                    return
                except LogError as error:
                    logger.warning("%s is not stored yet: %s", event, error)
                    await anyio.sleep(SAY_AGAIN_S)
        if timer.cancelled_caught:
            logger.error("%s could not be stored", event)


def failed(status: int, problem: Problem) -> HTTPError:
    headers = FINAL if problem.code in ENDS_AGAIN else ()
    return HTTPError(status, problem.message, code=problem.code, param=problem.param, headers=headers)
