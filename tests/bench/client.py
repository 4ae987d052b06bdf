"""A cheap closed-loop streaming client: many streams in one process, one connection each.

    requests → sockets → frames with their time of arrival → one observation per request

It reads SSE with one or more frames in a chunk, and keeps only a frame's time. The last frames' usage is
compared with the requested tokens.
"""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

# An answer without data for this long is an error, and ends the run.
SILENCE_S = 60.0
# Bytes of an error response that are shown.
SHOWN_BYTES = 300


class BenchRequest(NamedTuple):
    """A request, and the function that classifies a frame of its answer."""

    path: str
    body: dict[str, Any]
    output_tokens: int
    reads: Callable[[bytes], str]


@dataclass
class Observation:
    """The times of one request, in seconds by one clock, and its first error."""

    request: BenchRequest
    sent_at_s: float = 0.0
    tokens_at_s: list[float] = field(default_factory=list)
    ended_at_s: float = 0.0
    prompt_tokens: int = 0
    wrong: str | None = None


def openai_frame(frame: bytes) -> str:
    """Classify a frame of `/v1/completions`. A chunk without text or finish reason has no tokens."""
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
    """One HTTP/1.1 connection, for one request at a time."""

    def __init__(self, host: str, key: str) -> None:
        self._host = host
        self._key = key
        self._transport: asyncio.Transport
        self._rest = b""
        self.seen = Observation(BenchRequest("", {}, 0, native_frame))
        self._done: asyncio.Future[None] | None = None
        self._heard_at_s = 0.0
        self._head = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    async def ask(self, request: BenchRequest) -> Observation:
        """Send the request and return the observation of its whole answer."""
        done = self.start(request)
        while not done.done():
            await asyncio.wait([done], timeout=SILENCE_S)
            if time.perf_counter() - self._heard_at_s > SILENCE_S:
                self._fail("silence")
        return self.seen

    def start(self, request: BenchRequest) -> asyncio.Future[None]:
        """Send the request; `seen` grows until the future is done."""
        body = json.dumps(request.body).encode()
        head = (
            f"POST {request.path} HTTP/1.1\r\nHost: {self._host}\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.seen = Observation(request)
        self._rest = b""
        self._head = True
        self._done = asyncio.get_running_loop().create_future()
        self.seen.sent_at_s = self._heard_at_s = time.perf_counter()
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
        now = self._heard_at_s = time.perf_counter()
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
        if seen.ended_at_s and self._rest.endswith(b"0\r\n\r\n"):
            self._done.set_result(None)

    def _read(self, seen: Observation, frame: bytes, now: float) -> None:
        kind = seen.request.reads(frame)
        if kind == "tokens":
            seen.tokens_at_s.append(now)
        elif "usage" in kind:
            self._count(seen, frame)
        elif kind == "wrong" and b"data: " in frame:
            seen.wrong = seen.wrong or frame[:SHOWN_BYTES].decode(errors="replace")
        if kind.endswith("end"):
            seen.ended_at_s = now

    def _count(self, seen: Observation, frame: bytes) -> None:
        usage = json.loads(frame[frame.index(b"data: ") + 6 :])["usage"]
        seen.prompt_tokens = usage["prompt_tokens"]
        output = usage.get("completion_tokens", usage.get("output_tokens"))
        if output != seen.request.output_tokens:
            seen.wrong = f"{output} tokens arrived, {seen.request.output_tokens} were requested"

    def _fail(self, why: str) -> None:
        if self._done is not None and not self._done.done():
            self.seen.wrong = self.seen.wrong or why
            self._done.set_result(None)


class Window(NamedTuple):
    """The observations of a run, and the interval in which all streams were busy."""

    began_at_s: float
    ended_at_s: float
    seen: list[Observation]


async def closed_loop(
    url: str,
    key: str,
    bench_requests: Iterator[BenchRequest],
    *,
    streams: int,
    warm_s: float,
    measured_s: float,
    mark: Callable[[], None],
) -> Window:
    """Keep `streams` requests open for `warm_s + measured_s`. Calls `mark` at both ends of the window."""
    match = re.fullmatch(r"http://([^:/]+):(\d+)", url)
    assert match, f"{url} is not http://HOST:PORT"
    host, port = match[1], int(match[2])
    loop = asyncio.get_running_loop()
    until = time.perf_counter() + warm_s + measured_s
    observations: list[Observation] = []

    async def stream() -> None:
        _, connection = await loop.create_connection(lambda: Connection(f"{host}:{port}", key), host, port)
        while time.perf_counter() < until:
            observations.append(await connection.ask(next(bench_requests)))
            if observations[-1].wrong:
                break
        connection.close()

    tasks = [asyncio.create_task(stream()) for _ in range(streams)]
    await asyncio.sleep(warm_s)
    mark()
    began_at_s = time.perf_counter()
    await asyncio.sleep(until - began_at_s)
    ended_at_s = time.perf_counter()
    mark()
    await asyncio.gather(*tasks)
    return Window(began_at_s, ended_at_s, observations)
