"""A lane's reader: what the log says of its requests, to the streams that wait.

One reader for all of them; each event is folded once, and put into the buffer of every stream that
waits for its request. Nothing reaches a client that did not come from the log.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

import anyio

from events import codec, subjects
from events.ids import RequestId
from events.lifecycle import NEW, Life, advance
from events.log import Follower, Log
from events.request_history import HistoryReader, in_order
from events.request_states import RequestStates
from events.schema import ClientAttached, Problem, RequestAccepted
from rift.gateway.asgi.request import WriteChunk
from rift.gateway.completion import Completion
from rift.gateway.dialects.dialect import StreamFormat
from rift.gateway.streams.queue_depth import QueueDepth

logger = logging.getLogger(__name__)

# What all clients together may be behind. A whole answer is about 100 kB as frames, so this is some
# thousands of clients that do not read at all.
BUFFERED_BYTES_MAX = 256 * 1024 * 1024

SLOW = Problem(code="slow_reader", message="the client reads slower than the answer comes; resume it")


class Subscription:
    """One client that waits for one request, or for those of one group. Without a format it waits for the
    end only.

    `after` is the number of the (first) request's counted events that the client has: before it came, and
    then taken. `stored` says that the log holds its acceptances. `moved` is set once an attempt has started
    or a request has ended; `ended` when nothing more will come: all have ended, or for a client one has
    failed. `finished` holds the answers that have ended, in the log's order. `attended` says that a client is
    here; `sent_at` is when it was last sent something.
    """

    def __init__(self, answers: Sequence[Completion], format: StreamFormat | None, *, after: int = 0) -> None:
        self.answers = {answer.id: answer for answer in answers}
        self.answer = answers[0]
        self.format = format
        self.finished: list[Completion] = []
        self.after = self._skip = after
        self.moved = anyio.Event()
        self.stored = True
        self.ended = False
        self.broken: Problem | None = None
        self.attended = True
        self.attachments = 0
        self.buffered = 0
        self.sent_at = 0.0
        self._write: WriteChunk | None = None
        self._frames: list[bytes] = []
        self._wake = anyio.Event()
        self._nudged = False

    @property
    def is_waiting(self) -> bool:
        """Nobody has begun with the request yet."""
        return not self.moved.is_set()

    @property
    def has_news(self) -> bool:
        """There is something to take, or the end."""
        return bool(self._frames) or self.ended

    def push(self, request: str, event: Any, life: Life, stored_at_ns: int) -> int:
        """Take an event that counted; return how many bytes it put into the buffer."""
        answer = self.answers[request]
        if life.counted <= answer.life.counted:
            return 0
        if answer.seal is not None:
            event = answer.seal.opened(event)
        answer.add(event, life, stored_at_ns)
        if life.phase == "ended":
            self.finished.append(answer)
        if self.ended:
            return 0
        if life.attempt is not None or life.phase == "ended":
            self.moved.set()
        self.ended = life.phase == "ended" and self._is_over()
        frame = self.format.event(event, answer) if self.format and life.counted > self._skip else b""
        if frame or self.ended:
            self._frames.append(frame)
            if self._write is None or self.ended:
                self._notify()
        self.buffered += len(frame)
        return len(frame)

    def write(self) -> bool:
        """Write what was pushed past the task that delivers, if that waits and the client is not behind."""
        if self._write is None or self.ended or not self._frames:
            return False
        if not self._write(b"".join(self._frames)):
            self._write = None
            self._notify()
            return False
        self.take()
        return True

    def break_off(self, problem: Problem) -> None:
        """End the stream, not the request; what the client has not taken yet is dropped."""
        if not self.ended:
            self.ended = True
            self.broken = problem
            self._frames = [self.format.broken_off(problem, self.after)] if self.format else []
            self.moved.set()
            self._notify()

    def let_client_go(self) -> None:
        """Nobody takes frames any more; the request is still followed."""
        self.format = None
        self._write = None
        self._frames = []
        self.attended = False
        self.ended = self._is_over()

    def open_requests(self) -> list[Completion]:
        return [answer for answer in self.answers.values() if answer.life.phase != "ended"]

    def failure(self) -> tuple[int, Problem] | None:
        """Return the status and the problem of the request that failed first, if one has."""
        return next((failure for answer in self.finished if (failure := answer.failure())), None)

    def _is_over(self) -> bool:
        return not self.open_requests() or (self.attended and self.failure() is not None)

    def take(self) -> bytes:
        frames = self._frames
        self._frames = []
        self.after = max(self.after, self.answer.life.counted)
        self.sent_at = anyio.current_time()
        return b"".join(frames)

    def _notify(self) -> None:
        wake = self._wake
        self._wake = anyio.Event()
        wake.set()

    def nudge(self) -> None:
        """Have `wait` return, whatever there is."""
        self._nudged = True
        self._notify()

    async def wait(self, write: WriteChunk | None = None) -> None:
        """Return once there is something to take, or the end. Meanwhile the relay may `write` by itself."""
        try:
            while not self.has_news and not self._nudged:
                self._write = write
                await self._wake.wait()
        finally:
            self._write = None
            self._nudged = False

    async def wait_for_end(self, *, or_attached: bool = False) -> None:
        """Return once the request has ended, or if so wanted once some gateway's client has attached."""
        seen = self.attachments
        while not self.ended and not (or_attached and self.attachments > seen):
            await self._wake.wait()

    async def wait_for_company(self) -> None:
        """Return once another client has attached to the request, here or at another gateway."""
        while not self.attachments:
            await self._wake.wait()

    def attached(self) -> None:
        self.attachments += 1
        self._notify()


class LaneReader:
    def __init__(self, log: Log, histories: HistoryReader, *, shard: int, lane: str) -> None:
        self._log = log
        self._histories = histories
        self._shard = shard
        self._lane = lane
        self._lives = RequestStates()
        self._streams: dict[str, list[Subscription]] = {}
        self._joining = 0
        self._missed: list[tuple[Any, subjects.Address, int]] = []
        self._reader: Follower
        self._buffered = 0
        self.queue = QueueDepth()
        self._pushed: dict[int, Subscription] = {}
        # The broker's time, as far as this lane's records tell: a report comes every few seconds.
        self.newest_ns = 0
        self._newest_at = 0.0

    def now_ns(self) -> int:
        """The broker's time, as far as this lane's records tell: never ahead of it."""
        return self.newest_ns + int((anyio.current_time() - self._newest_at) * 1e9) if self.newest_ns else 0

    @property
    def position(self) -> int:
        return self._reader.position

    @property
    def is_idle(self) -> bool:
        return not self._streams and not self._joining

    def running(self, model: str) -> int:
        """Return how many requests of a model that are followed here have been started, and not ended."""
        lives = [
            streams[0].answers[request].life
            for request, streams in self._streams.items()
            if streams[0].answers[request].accepted.model == model
        ]
        return sum(life.attempt is not None and life.phase != "ended" for life in lives)

    def open_of(self, key: str) -> list[str]:
        """Return the requests followed here that are stored under a key, and have not ended."""
        return [
            request
            for request, (stream, *_) in self._streams.items()
            if stream.answers[request].accepted.key == key
            and stream.answers[request].life.phase != "ended"
            and stream.stored
        ]

    def open(self, stream: Subscription) -> None:
        """Follow a request that is about to be appended; who appends it says once it is stored."""
        stream.stored = False
        for request, answer in stream.answers.items():
            assert request not in self._streams, "a request is accepted once"
            accepted = answer.accepted
            answer.life = advance(NEW, accepted)
            # Until an attempt says when it was stored.
            answer.accepted_at_ns = self.now_ns()
            self.queue.add([accepted])
            self._lives.follow(request, answer.life)
            self._streams[request] = [stream]

    async def attach(
        self, requests: Sequence[RequestId], make: Callable[[list[RequestAccepted]], Subscription]
    ) -> Subscription | None:
        """Follow a request, or a group, from its first event on, whatever became of it meanwhile. `make` is
        given those that the log holds; None where it holds none. Raises LogError.
        """
        since = len(self._missed)
        self._joining += 1
        try:
            pasts = await self._histories.read_all(requests)
            missed = self._missed[since:]
        finally:
            self._joining -= 1
            if not self._joining:
                self._missed = []
        there = [past.accepted for past in pasts if past.accepted is not None]
        if not there:
            return None
        stream = make(there)
        lives = RequestStates()
        for past in pasts:
            if past.accepted is not None:
                stream.answers[past.accepted.request].seal = past.seal
        for request, counted in in_order(pasts):
            self._buffered += stream.push(request, counted.event, counted.life, counted.stored_at_ns)
        for past in pasts:
            if past.accepted is not None:
                lives.follow(past.accepted.request, past.life)
        for event, at, stored_at_ns in missed:
            if (found := lives.fold(event, at)) is not None:
                self._buffered += stream.push(found[0], event, found[1], stored_at_ns)
        for answer in [] if stream.ended else stream.open_requests():
            if answer.id not in self._lives:
                self._lives.follow(answer.id, lives[answer.id])
            self._streams.setdefault(answer.id, []).append(stream)
        return stream

    def close(self, stream: Subscription) -> None:
        self.taken(stream)
        for request, answer in stream.answers.items():
            streams = self._streams.get(request, [])
            if stream in streams:
                streams.remove(stream)
                if not streams:
                    del self._streams[request]
                    self._lives.forget(request)
                    self.queue.remove([answer.accepted])

    def join(self, stream: Subscription) -> None:
        """Follow with another stream what `open` follows already."""
        for request, answer in stream.answers.items():
            answer.life = self._lives[request]
            self._streams[request].append(stream)

    def has_client(self, request: str) -> bool:
        """Say whether a client of this gateway still waits for the request."""
        return any(stream.attended for stream in self._streams.get(request, []))

    def taken(self, stream: Subscription) -> None:
        """The stream's buffer was taken, or is given up."""
        self._buffered -= stream.buffered
        stream.buffered = 0

    def nudge(self, models: Collection[str]) -> None:
        """Wake the streams that wait for one of these models."""
        for streams in self._streams.values():
            for stream in streams:
                if stream.is_waiting and stream.answer.accepted.model in models:
                    stream.nudge()

    def break_off_all(self, problem: Problem) -> None:
        for streams in self._streams.values():
            for stream in streams:
                stream.break_off(problem)

    async def run(self, *, opened: Callable[[], None]) -> None:
        """Read for as long as the gateway lives. Raises codec.RecordUnreadable."""
        stream = subjects.shard_stream(self._shard)
        after = await self._log.last_sequence(stream)
        topics = subjects.answers(self._shard, self._lane)
        async with self._log.follow(stream, topics, after=after) as self._reader:
            opened()
            async for batch in self._reader:
                for stored in batch:
                    if stored.stored_at_ns > self.newest_ns:
                        self.newest_ns = stored.stored_at_ns
                        self._newest_at = anyio.current_time()
                    at = subjects.parse(stored.subject)
                    for event in codec.decode(stored.data)[1]:
                        if at is not None:
                            self._relay(event, at, stored.stored_at_ns)
                        elif isinstance(event, ClientAttached):
                            for waiting in self._streams.get(event.request, []):
                                waiting.attached()
                self._write_pushed()

    def _relay(self, event: Any, at: subjects.Address, stored_at_ns: int) -> None:
        if self._joining:
            self._missed.append((event, at, stored_at_ns))
        if isinstance(event, codec.Unreadable):
            self._fail(event)
            return
        counted = self._lives.fold(event, at)
        if counted is None:
            return
        request, life = counted
        if life.counted == 2:
            self.queue.remove([self._streams[request][0].answers[request].accepted])
        for stream in self._streams[request]:
            self._buffered += stream.push(request, event, life, stored_at_ns)
            self._pushed[id(stream)] = stream
        if self._buffered > BUFFERED_BYTES_MAX:
            self._break_off_slowest()

    def _write_pushed(self) -> None:
        """What one batch brought to a stream is one chunk."""
        pushed = self._pushed
        self._pushed = {}
        for stream in pushed.values():
            if stream.write():
                self.taken(stream)

    def _break_off_slowest(self) -> None:
        every = [stream for streams in self._streams.values() for stream in streams]
        slowest = max(every, key=lambda stream: stream.buffered)
        # What is buffered may be of streams that only take what has ended.
        if slowest.buffered:
            self.taken(slowest)
            slowest.break_off(SLOW)

    def _fail(self, event: codec.Unreadable) -> None:
        """A newer writer's event: this gateway cannot go on with that request, and says so."""
        logger.error("unreadable event %s: %s", event.type, event.problem)
        for stream in self._streams.get(self._lives.request_of(event) or "", []):
            stream.break_off(
                Problem(code="unreadable", message="this gateway is older than the answer's writer")
            )
