"""A closed-loop streaming client that costs little: many streams in one process, one connection each.

    wishes → sockets → frames with the time they came → what each request saw

It reads SSE as servers write it, one frame or several in a chunk, and keeps nothing of a frame but its
time; what the last frames say of usage is compared with what was asked.
"""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

# An answer that says nothing for so long is an error, and ends the run.
SILENCE_S = 60.0
# Of an answer that is no stream, so much is kept to be shown.
SHOWN_BYTES = 300


class Wish(NamedTuple):
    """What is asked, and how a frame of the answer is read: as tokens, as the end, or not at all."""

    path: str
    body: dict[str, Any]
    output_tokens: int
    reads: Callable[[bytes], str]


@dataclass
class Seen:
    """What one request saw: seconds by one clock, and the first thing that was wrong."""

    wish: Wish
    sent_at: float = 0.0
    tokens_at: list[float] = field(default_factory=list)
    ended_at: float = 0.0
    prompt_tokens: int = 0
    wrong: str | None = None


def openai_frame(frame: bytes) -> str:
    """A frame of `/v1/completions`: a last chunk without text is no tokens, but its end's form."""
    if b'"choices":[]' in frame:
        return "usage"
    if frame.endswith(b"data: [DONE]"):
        return "end"
    if b'"text":""' in frame and b'"finish_reason":null' not in frame:
        return ""
    return "tokens" if b'"text":"' in frame else "wrong"


def native_frame(frame: bytes) -> str:
    if b"event: token\n" in frame:
        return "tokens"
    if b"event: done\n" in frame:
        return "usage end"
    return "" if b"event: status\n" in frame else "wrong"


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection that asks one thing after the other."""

    def __init__(self, host: str, key: str) -> None:
        self._host, self._key = host, key
        self._transport: asyncio.Transport
        self._rest = b""
        self.seen = Seen(Wish("", {}, 0, native_frame))
        self._done: asyncio.Future[None] | None = None
        self._heard_at = 0.0
        self._head = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    async def ask(self, wish: Wish) -> Seen:
        """Return what was seen of the whole answer."""
        done = self.start(wish)
        while not done.done():
            await asyncio.wait([done], timeout=SILENCE_S)
            if time.perf_counter() - self._heard_at > SILENCE_S:
                self._fail("silence")
        return self.seen

    def start(self, wish: Wish) -> asyncio.Future[None]:
        """Send the request; `seen` grows until the future is done."""
        body = json.dumps(wish.body).encode()
        head = (
            f"POST {wish.path} HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.seen, self._rest, self._head = Seen(wish), b"", True
        self._done = asyncio.get_running_loop().create_future()
        self.seen.sent_at = self._heard_at = time.perf_counter()
        self._transport.write(head.encode() + body)
        return self._done

    def close(self) -> None:
        self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("connection lost")

    def data_received(self, data: bytes) -> None:
        seen = self.seen
        if self._done is None or self._done.done():
            return
        now = self._heard_at = time.perf_counter()
        data = self._rest + data
        if self._head:
            head, blank, rest = data.partition(b"\r\n\r\n")
            if not blank:
                self._rest = data
                return
            if not head.startswith(b"HTTP/1.1 200"):
                self._fail(data[:SHOWN_BYTES].decode(errors="replace"))
                return
            self._head, data = False, rest
        *frames, self._rest = data.split(b"\n\n")
        for frame in frames:
            self._read(seen, frame, now)
        if seen.ended_at and self._rest.endswith(b"0\r\n\r\n"):
            self._done.set_result(None)

    def _read(self, seen: Seen, frame: bytes, now: float) -> None:
        kind = seen.wish.reads(frame)
        if kind == "tokens":
            seen.tokens_at.append(now)
        elif "usage" in kind:
            self._count(seen, frame)
        elif kind == "wrong" and b"data: " in frame:
            seen.wrong = seen.wrong or frame[:SHOWN_BYTES].decode(errors="replace")
        if kind.endswith("end"):
            seen.ended_at = now

    def _count(self, seen: Seen, frame: bytes) -> None:
        usage = json.loads(frame[frame.index(b"data: ") + 6 :])["usage"]
        seen.prompt_tokens = usage["prompt_tokens"]
        output = usage.get("completion_tokens", usage.get("output_tokens"))
        if output != seen.wish.output_tokens:
            seen.wrong = f"{output} tokens came, {seen.wish.output_tokens} were asked for"

    def _fail(self, why: str) -> None:
        if self._done is not None and not self._done.done():
            self.seen.wrong = self.seen.wrong or why
            self._done.set_result(None)


class Window(NamedTuple):
    """What came between two moments of a run with all its streams busy."""

    began_at: float
    ended_at: float
    seen: list[Seen]


async def closed_loop(
    url: str,
    key: str,
    wishes: Iterator[Wish],
    *,
    streams: int,
    warm_s: float,
    measured_s: float,
    mark: Callable[[], None],
) -> Window:
    """Keep `streams` requests open for `warm_s + measured_s`; `mark` is called at the window's ends."""
    match = re.fullmatch(r"http://([^:/]+):(\d+)", url)
    assert match, f"{url} is not http://HOST:PORT"
    host, port = match[1], int(match[2])
    loop = asyncio.get_running_loop()
    until = time.perf_counter() + warm_s + measured_s
    everything: list[Seen] = []

    async def stream() -> None:
        _, connection = await loop.create_connection(lambda: Connection(f"{host}:{port}", key), host, port)
        while time.perf_counter() < until:
            everything.append(await connection.ask(next(wishes)))
            if everything[-1].wrong:
                break
        connection.close()

    tasks = [asyncio.create_task(stream()) for _ in range(streams)]
    await asyncio.sleep(warm_s)
    mark()
    began_at = time.perf_counter()
    await asyncio.sleep(until - began_at)
    ended_at = time.perf_counter()
    mark()
    await asyncio.gather(*tasks)
    return Window(began_at, ended_at, everything)
