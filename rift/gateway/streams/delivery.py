"""Send an answer to its client, whole or in frames, and handle a client that disconnects before the end.

a detached request   (in the background, or with an idempotency key) continues
a resumable stream   is cancelled unless a client attaches to it, at any gateway, within a grace period
any other request    is cancelled at once

If one request of a body fails, the answer fails, and the others are cancelled. If the failure is Rift's, what
the client did not receive costs nothing. If it is the client's, as a prompt that a worker refuses, the others
are cancelled as for a client that left: they would otherwise be free for one who adds such a prompt.

If the log stores nothing, every stream ends with an error, and the grace period begins once the log stores
again. A request that is cancelled because its client left during such an outage counts as unanswered: it
costs nothing, even if it has ended by then.
"""

from collections.abc import Iterable

import anyio
from anyio import TaskHandle
from anyio.abc import TaskGroup

from events.book import Book
from events.contracts import CLIENT_ATTACHED_S, CLIENT_GRACE_S
from events.schema import CancelReason, ClientAttached, Problem
from rift.gateway.asgi.cors import server_timing
from rift.gateway.asgi.errors import FINAL, Headers, HTTPError, retry_after
from rift.gateway.asgi.request import Request
from rift.gateway.completion import Completion
from rift.gateway.dialects import dialect as dialects
from rift.gateway.streams.cancellation import Cancellation
from rift.gateway.streams.lane_reader import LaneReader
from rift.gateway.streams.queue_status import QueueStatus, Status
from rift.gateway.streams.subscription import Subscription

# Proxies close connections that are silent for 30 s or more.
KEEP_ALIVE_S = 12.0

# How often an estimate is refreshed: often enough for a screen to look alive, and cheap for a crowd.
STATUS_S = 2.0

# A gateway reports the clients of one request at most this often: far more often than a grace period.
REPORT_PAUSE_S = 1.0

# A stream answers with headers when its output begins, or after this time. A request that fails earlier, as
# one that its engine refuses, is answered with an HTTP error.
STATUS_LINE_S = 1.0

# The status for formats that do not show it: a change of status is then no news.
HIDDEN = Status("queued")

# A repeat would fail the same way: the request stopped its engine three times, or cannot be read.
FINAL_CODES = ("poison", "prompt_unreadable", "content_removed")

# The statuses of failures for which nothing may be charged that the client has not received.
OUR_FAILURES = (500, 503)

STOPPING = Problem(
    code="gateway_stopping", message="this gateway is shutting down; resume the stream, or fetch the answer"
)
LOG_OUTAGE = Problem(
    code="log_unavailable",
    message="the log stores nothing, so the rest of this answer cannot be shown now; try again later",
)
REVOKED = Problem(code="revoked_api_key", message="the API key that reads this stream was revoked")
SSE_HEADERS = [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]


class Delivery:
    """`tasks` outlives each client."""

    def __init__(
        self,
        cancellation: Cancellation,
        *,
        book: Book,
        queue_status: QueueStatus,
        tasks: TaskGroup,
        stopping: anyio.Event,
    ) -> None:
        self.cancellation = cancellation
        self._health = cancellation.health
        self._book = book
        self._queue_status = queue_status
        self._tasks = tasks
        # When each request's clients were last reported, oldest first; for REPORT_PAUSE_S.
        self._reported: dict[str, float] = {}
        # The key with which each client reads.
        self._keys: dict[Subscription, str] = {}
        self._stopping = stopping

    def revoke(self, key: str) -> None:
        """Break off streams that a revoked key reads from requests of other keys of its account."""
        for subscription, reading in self._keys.items():
            if reading == key and subscription.answer.accepted.key != key:
                subscription.break_off(REVOKED)

    def open_answers(self) -> dict[tuple[str, ...], int]:
        """Return how many answers clients wait for, by kind."""
        whole = sum(one.client is not None and one.client.format is None for one in self._keys)
        return {("stream",): len(self._keys) - whole, ("whole",): whole}

    async def deliver(
        self,
        request: Request,
        reader: LaneReader,
        subscription: Subscription,
        *,
        resumed: bool,
        headers: Headers = (),
    ) -> None:
        """Send the answer from the log's events. Raises HTTPError for a failure before the first byte."""
        assert subscription.client is not None, "an answer is delivered to a client"
        failure: HTTPError | None = None
        send = self._send_frames if subscription.client.format else self._send_whole
        self._keys[subscription] = request.key
        if self._book.keys[request.key].revoked_at_ns is not None:
            # The key was revoked after this request was authenticated.
            self.revoke(request.key)
        reports: list[TaskHandle[None]] = []

        def stay() -> None:
            reports.append(self._tasks.start_soon(self._stay_attached, subscription))

        if resumed:
            stay()
        else:
            subscription.at_attachment(stay)
        try:
            with anyio.CancelScope() as sending:
                request.when_gone(sending.cancel)
                failure = await send(request, subscription, headers, resumed)
        finally:
            subscription.note_output(request.exchange)
            subscription.at_attachment(None)
            for report in reports:
                report.cancel()
            del self._keys[subscription]
            reader.release_client(subscription)
            if self._stopping.is_set():
                # The loss of this gateway's lane covers the clients that disconnect from here on.
                reader.close(subscription)
            elif failure is not None and subscription.failure() is not None:
                self._tasks.start_soon(self._failed, subscription, subscription.answers.values())
            elif not subscription.is_over:
                self._tasks.start_soon(self._client_gone, reader, subscription, resumed)
        if failure is not None:
            raise failure

    # --- sending ---------------------------------------------------------------------------------------

    async def _send_whole(
        self, request: Request, subscription: Subscription, headers: Headers, resumed: bool
    ) -> HTTPError | None:
        """Send the whole object once the request has ended; return a failure instead."""
        await subscription.wait_for_end()
        if subscription.problem is REVOKED:
            return http_error(401, REVOKED)
        if subscription.problem is LOG_OUTAGE:
            return HTTPError(503, LOG_OUTAGE.message, code=LOG_OUTAGE.code, headers=retry_after(5))
        if failure := _failure(subscription):
            return failure
        if subscription.open_requests():
            message = (
                f"this gateway is shutting down; fetch the answer at /v1/inference/{subscription.answer.id}"
            )
            return HTTPError(503, message, code=STOPPING.code, headers=retry_after(1))
        # An answer takes as long as the choice that ends last.
        timed = [*headers, *server_timing(subscription.finished[-1].timing())]
        dialect = dialects.of(subscription.answer.accepted.kind)
        for answer in subscription.finished:
            await dialect.encode(answer)
        await request.answer(200, dialect.whole(subscription.finished), timed)
        return None

    async def _send_frames(
        self, request: Request, subscription: Subscription, headers: Headers, resumed: bool
    ) -> HTTPError | None:
        """Send frames as the log brings them; return a failure that comes before the first."""
        client = subscription.client
        assert client is not None, "frames are sent to a client"
        format = client.format
        assert format is not None, "frames have a format"
        if not resumed:
            with anyio.move_on_after(STATUS_LINE_S):
                await subscription.wait_for_output()
            if subscription.is_over and (failure := _failure(subscription)):
                return failure
        timed = [*headers, *server_timing(subscription.answer.timing())]
        await request.start(200, b"text/event-stream", [*SSE_HEADERS, *timed])
        request.probe_with(format.keep_alive)
        client.note_sent()
        notices = StatusNotices()
        while True:
            is_waiting = subscription.state == "waiting"
            if is_waiting:
                status = self._queue_status.status(subscription.answer.accepted.model)
                if notices.is_due(status if format.tells_status else HIDDEN, anyio.current_time()):
                    client.note_sent()
                    await request.write(format.waiting(status.name, status.estimate_ms), more=True)
            wait_until_s = client.sent_at_s + KEEP_ALIVE_S
            if is_waiting and format.tells_status:
                wait_until_s = anyio.current_time() + STATUS_S
            with anyio.move_on_at(wait_until_s):
                await subscription.wait_for_news(request.write_chunk)
            if subscription.has_news:
                more = not subscription.is_over
                await request.write_part(client.take(), more=more)
                if not more:
                    return None
            elif subscription.state != "waiting" and anyio.current_time() >= client.sent_at_s + KEEP_ALIVE_S:
                client.note_sent()
                await request.write(format.keep_alive, more=True)

    # --- attaching and leaving -------------------------------------------------------------------------

    async def _stay_attached(self, subscription: Subscription) -> None:
        """Report this client, so that no gateway cancels the request when another client disconnects.

        A client that resumed is reported at once, the first client only after another has attached.
        """
        accepted = subscription.answer.accepted
        while not accepted.detached:
            await self._report_attached(accepted.request)
            await anyio.sleep(CLIENT_ATTACHED_S)

    async def _report_attached(self, request: str) -> None:
        """Append a report unless this gateway has just reported another client of the request.

        Clients may reconnect at any rate, and each report is a record.
        """
        now_s = anyio.current_time()
        while self._reported and next(iter(self._reported.values())) + REPORT_PAUSE_S <= now_s:
            del self._reported[next(iter(self._reported))]
        if (at_s := self._reported.get(request)) is not None:
            await anyio.sleep_until(at_s + REPORT_PAUSE_S)
            if self._reported.get(request, at_s) > at_s:
                return
            self._reported.pop(request, None)
        self._reported[request] = anyio.current_time()
        await self.cancellation.keep_publishing(ClientAttached(request=request))

    async def _client_gone(self, reader: LaneReader, subscription: Subscription, resumed: bool) -> None:
        """Cancel requests that no client waits for, after a grace period if the client may resume."""
        accepted = subscription.answer.accepted
        left_at_s = anyio.current_time()
        if subscription.problem is LOG_OUTAGE or not self._health.is_writable:
            self._health.note_failure()
        if subscription.failure() is not None:
            await self._failed(subscription, subscription.open_requests())
        elif not accepted.detached:
            is_needed = reader.has_client(accepted.request)
            if resumed or (dialects.of(accepted.kind).is_resumable and accepted.stream):
                with reader.expecting_client(accepted.request) as attached:
                    is_needed = await self._comes_back(subscription, attached, left_at_s) or is_needed
            reader.close(subscription)
            if not is_needed and not reader.has_client(accepted.request):
                if self._health.failed_at_s < left_at_s:
                    await self._cancel(subscription.open_requests(), "disconnect")
                else:
                    # Also those that have ended meanwhile: nobody has read the whole answer.
                    await self._cancel(subscription.answers.values(), "unanswered")

    async def _failed(self, subscription: Subscription, unread: Iterable[Completion]) -> None:
        """Cancel the requests that the client did not receive because another one of its body has failed."""
        failed = subscription.failure()
        assert failed is not None, "called for a failure"
        if failed[0] in OUR_FAILURES:
            await self._cancel([each for each in unread if each.failure() is None], "unanswered")
        else:
            await self._cancel(subscription.open_requests(), "disconnect")

    async def _comes_back(self, subscription: Subscription, attached: anyio.Event, left_at_s: float) -> bool:
        """Return whether a client attaches, or the answer is complete, within a grace period during which the
        log stores records."""
        while True:
            began_at_s = anyio.current_time()
            with anyio.move_on_after(CLIENT_GRACE_S):
                if self._health.failed_at_s >= left_at_s:
                    # Nobody has read an end that comes after the outage.
                    await attached.wait()
                else:
                    await subscription.wait_for_end(or_attachment=True)
                return True
            if self._health.failed_at_s < began_at_s:
                return False

    async def _cancel(self, answers: Iterable[Completion], why: CancelReason) -> None:
        async with anyio.create_task_group() as tasks:
            for answer in answers:
                tasks.start_soon(self.cancellation.cancel, answer.id, why)


def _failure(subscription: Subscription) -> HTTPError | None:
    """Return the failure of the request, in the words of its API."""
    if (failure := subscription.failure()) is None:
        return None
    status, problem = failure
    return http_error(status, dialects.of(subscription.answer.accepted.kind).translate(problem))


def http_error(status: int, problem: Problem) -> HTTPError:
    headers = FINAL if problem.code in FINAL_CODES else ()
    return HTTPError(status, problem.message, code=problem.code, param=problem.param, headers=headers)


class StatusNotices:
    """When one client is sent its status: another status at once, another estimate every STATUS_S."""

    def __init__(self) -> None:
        self._last: Status | None = None
        self._sent_at_s = 0.0

    def is_due(self, status: Status, now_s: float) -> bool:
        """Return whether to send the status now; if so, it counts as sent."""
        last = self._last
        if last is not None and last.name == status.name:
            pause_s = KEEP_ALIVE_S if last == status else STATUS_S
            if now_s < self._sent_at_s + pause_s:
                return False
        self._last = status
        self._sent_at_s = now_s
        return True
