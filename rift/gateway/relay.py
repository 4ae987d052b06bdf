"""The lane's reader: what the log says of the requests of this gateway, to the streams that wait.

One reader for all of them; each event is folded once, formatted once and put into its stream's
buffer. Nothing reaches a client that did not come from the log.
"""

import logging
from collections.abc import Callable
from typing import Any, Protocol

import anyio

from events import codec, subjects
from events.lifecycle import NEW, advance
from events.lives import Lives
from events.log import Follower, Log
from events.schema import Problem, RequestAccepted
from rift.gateway.answer import Answer

logger = logging.getLogger(__name__)

# What all clients together may be behind. A whole answer is about 100 kB as frames, so this is some
# thousands of clients that do not read at all.
BUFFERED_BYTES_MAX = 256 * 1024 * 1024

SLOW = Problem(
    code="slow_reader", message="the client reads slower than the answer comes; fetch it by its id"
)


class Format(Protocol):
    """How a stream's frames look; `native.py` and `openai.py` have one each."""

    keep_alive: bytes

    def waiting(self, status: str) -> bytes: ...

    def event(self, event: Any) -> bytes: ...

    def broken_off(self, problem: Problem) -> bytes: ...


class Stream:
    """One client that waits for one request. Without a format it waits for the end only.

    `moved` is set once an attempt has started or the request has ended; `ended` when nothing more
    will come.
    """

    def __init__(self, answer: Answer, format: Format | None) -> None:
        self.answer, self.format = answer, format
        self.moved = anyio.Event()
        self.ended = False
        self.buffered = 0
        self._frames: list[bytes] = []
        self._wake = anyio.Event()

    def push(self, event: Any, stored_at_ns: int, life: Any) -> int:
        """Take an event that counted; return how many bytes it put into the buffer."""
        self.answer.add(event, life, stored_at_ns)
        if not self.moved.is_set() and (life.attempt is not None or life.phase == "ended"):
            self.moved.set()
        self.ended = life.phase == "ended"
        if self.format is None:
            if self.ended:
                self._wake.set()
            return 0
        frame = self.format.event(event)
        self._frames.append(frame)
        self.buffered += len(frame)
        self._wake.set()
        return len(frame)

    def break_off(self, problem: Problem) -> None:
        """End the stream, not the request; what the client has not taken yet is dropped."""
        if not self.ended:
            self.ended = True
            self._frames = [self.format.broken_off(problem)] if self.format else []
            self.moved.set()
            self._wake.set()

    def take(self) -> bytes:
        frames, self._frames = self._frames, []
        return b"".join(frames)

    async def wait(self) -> None:
        """Return once there is something to take, or the end."""
        if not self._frames and not self.ended:
            await self._wake.wait()
        self._wake = anyio.Event()


class Relay:
    def __init__(self, log: Log, *, shard: int, lane: str) -> None:
        self._log, self._shard, self._lane = log, shard, lane
        self._lives = Lives()
        self._streams: dict[str, Stream] = {}
        self._reader: Follower
        self._buffered = 0

    @property
    def position(self) -> int:
        return self._reader.position

    def open(self, accepted: RequestAccepted, stream: Stream) -> None:
        """Follow a request that is about to be appended."""
        self._streams[accepted.request] = stream
        self._lives.follow(accepted.request, advance(NEW, accepted))
        stream.answer.life = self._lives[accepted.request]

    def close(self, stream: Stream) -> None:
        request = stream.answer.id
        self._streams.pop(request, None)
        self._lives.forget(request)
        self.taken(stream)

    def taken(self, stream: Stream) -> None:
        """The stream's buffer was taken, or is given up."""
        self._buffered -= stream.buffered
        stream.buffered = 0

    def break_off_all(self, problem: Problem) -> None:
        for stream in self._streams.values():
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
                    at = subjects.parse(stored.subject)
                    assert at is not None, "the lane's subjects are those of requests"
                    for event in codec.decode(stored.data)[1]:
                        self._relay(event, at, stored.stored_at_ns)

    def _relay(self, event: Any, at: subjects.Address, stored_at_ns: int) -> None:
        if isinstance(event, codec.Unreadable):
            self._fail(event)
            return
        counted = self._lives.fold(event, at)
        if counted is None:
            return
        request, life = counted
        stream = self._streams[request]
        if stream.ended:
            return
        self._buffered += stream.push(event, stored_at_ns, life)
        if self._buffered > BUFFERED_BYTES_MAX:
            slowest = max(self._streams.values(), key=lambda stream: stream.buffered)
            self.taken(slowest)
            slowest.break_off(SLOW)

    def _fail(self, event: codec.Unreadable) -> None:
        """A newer writer's event: this gateway cannot go on with that request, and says so."""
        logger.error("unreadable event %s: %s", event.type, event.problem)
        if (stream := self._streams.get(self._lives.request_of(event) or "")) is not None:
            stream.break_off(
                Problem(code="unreadable", message="this gateway is older than the answer's writer")
            )
