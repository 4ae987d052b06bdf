"""One client of the native stream that follows the README's advice, and records what it receives.

It sends its request once. Without an answer, it repeats the request with the same idempotency key. If the
stream breaks off, it resumes after the last id, at any gateway. Any other failure is an anomaly.
"""

import heapq
import json
import random
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle, pairwise
from typing import Any, NamedTuple

import anyio
import httpx

from tests.chaos.checks import ENDS, Expected, Frame

# Longer than any fault of these tests and all waiting of a request together.
STREAM_S = 120.0
# Shorter than the `retry-after` of an error: the tests must not take that long.
RETRY_S = 0.1
CANCEL_POLL_S = 0.02
# Error codes that end the stream but not the request.
BROKEN_OFF = frozenset({"gateway_stopping", "slow_reader", "log_unavailable"})
# Statuses of a request that was not accepted: the client may retry, and is not charged.
REFUSED = frozenset({429, 503})


class ClientPlan(NamedTuple):
    """A client's request, and the expected answer if it can be predicted.

    The client cancels at `cancel_at` tokens. A fatal request ends every engine that starts it.
    """

    prompt: str
    seed: int
    max_tokens: int
    idempotency_key: str | None
    expected: Expected | None
    cancel_at: int | None = None
    fatal: bool = False

    def body(self, model: str) -> dict[str, Any]:
        parameters = {"max_tokens": self.max_tokens, "seed": self.seed}
        return {"model": model, "prompt": self.prompt, "parameters": parameters, "stream": True}


class Progress:
    """The number of tokens that all clients have received, which decides when a fault happens."""

    def __init__(self) -> None:
        self.tokens = 0
        self._waiting: list[tuple[int, int, anyio.Event]] = []

    def add(self, tokens: int) -> None:
        self.tokens += tokens
        while self._waiting and self._waiting[0][0] <= self.tokens:
            heapq.heappop(self._waiting)[2].set()

    async def reach(self, tokens: int) -> None:
        if tokens > self.tokens:
            reached = anyio.Event()
            heapq.heappush(self._waiting, (tokens, len(self._waiting), reached))
            await reached.wait()


class Transport(httpx.AsyncHTTPTransport):
    """Report a connection that its server resets at once as one that could not be made.

    uvloop then has no socket, and anyio fails at its address before httpx sends anything.
    """

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            return await super().handle_async_request(request)
        except AttributeError as error:
            if error.name != "getpeername":
                raise
            raise httpx.ConnectError("reset at once", request=request) from error


class Client:
    def __init__(
        self,
        http: httpx.AsyncClient,
        urls: Sequence[str],
        plan: ClientPlan,
        *,
        model: str,
        progress: Progress,
        chance: random.Random,
    ) -> None:
        self.plan, self.request = plan, ""
        self.frames: list[Frame] = []
        self.anomalies: list[str] = []
        self.refusals: list[str] = []
        self.breaks = 0
        self.orphans = 0
        self.attempts = 0
        self.asked_s = 0.0
        self._http, self._urls, self._body = http, list(urls), plan.body(model)
        self._progress, self._chance = progress, chance
        self._at = chance.randrange(len(urls))
        self._last_id, self._index = 0, -1
        self._by_id: dict[int, Frame] = {}
        self._over = False

    @property
    def ended(self) -> bool:
        return any(frame.event in ENDS for frame in self.frames)

    @property
    def url(self) -> str:
        return self._urls[self._at]

    async def run(self) -> None:
        """Receive the whole answer, or record an anomaly."""
        self.asked_s = anyio.current_time()
        with anyio.move_on_after(STREAM_S) as patience:
            async with anyio.create_task_group() as tasks:
                if self.plan.cancel_at is not None:
                    tasks.start_soon(self._cancel, self.plan.cancel_at)
                await self._listen()
                tasks.cancel_scope.cancel()
        if patience.cancelled_caught:
            self.anomalies.append(f"no end within {STREAM_S:g} s, after {len(self.frames)} frames")

    def first_s(self) -> float:
        """Return the time from the request to the first token."""
        tokens = (frame.at_s for frame in self.frames if frame.event == "token")
        return next(tokens, self.asked_s) - self.asked_s

    def gap_s(self) -> float:
        """Return the longest time between two tokens."""
        at_s = [frame.at_s for frame in self.frames if frame.event == "token"]
        return max((after - before for before, after in pairwise(at_s)), default=0.0)

    # --- sending -------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        """Send or resume until the answer has ended."""
        while not self.ended and not self._over:
            try:
                await (self._resume() if self.request else self._send())
            except httpx.TransportError as error:
                self._broken(error)
            if not self.ended and not self._over:
                self._at = (self._at + 1) % len(self._urls)
                await anyio.sleep(RETRY_S)

    async def _send(self) -> None:
        key = self.plan.idempotency_key
        headers = {"Idempotency-Key": key} if key else {}
        async with self._http.stream(
            "POST", f"{self.url}/v1/inference", json=self._body, headers=headers
        ) as response:
            await self._receive(response)

    async def _resume(self) -> None:
        if self.plan.idempotency_key and self._chance.random() < 0.5:
            await self._send()
            return
        headers = {"Last-Event-ID": str(self._last_id)}
        url = f"{self.url}/v1/inference/{self.request}/events"
        async with self._http.stream("GET", url, headers=headers) as response:
            if response.status_code == 204:
                self._give_up("204 before the end arrived")
                return
            await self._receive(response)

    async def _cancel(self, at_token: int) -> None:
        """Cancel after `at_token` tokens, trying all gateways until one answers."""
        while self._index + 1 < at_token:  # noqa: ASYNC110  # frames come in another task
            await anyio.sleep(CANCEL_POLL_S)
        for url in cycle([*self._urls[self._at :], *self._urls[: self._at]]):
            with suppress(httpx.TransportError):
                answer = await self._http.delete(f"{url}/v1/inference/{self.request}")
                if answer.status_code in (200, 202):
                    return
                if answer.status_code not in REFUSED:
                    self.anomalies.append(f"cancel: HTTP {answer.status_code} {answer.text[:300]}")
                    return
            await anyio.sleep(RETRY_S)

    def _broken(self, error: httpx.TransportError) -> None:
        """Count the break; without an idempotency key the request may be accepted unseen: an orphan."""
        self.breaks += 1
        refused = isinstance(error, httpx.ConnectError)
        if not self.request and not refused and not self.plan.idempotency_key:
            self.orphans += 1

    def _give_up(self, anomaly: str) -> None:
        self._over = True
        self.anomalies.append(anomaly)

    # --- receiving -----------------------------------------------------------------------------------

    async def _receive(self, response: httpx.Response) -> None:
        if response.status_code != 200:
            self._refused(response.status_code, await response.aread())
            return
        rest = b""
        async for chunk in response.aiter_raw():
            at_s = anyio.current_time()
            *blocks, rest = (rest + chunk).split(b"\n\n")
            for block in blocks:
                self._take(block.decode(), at_s)
        if rest:
            self.anomalies.append(f"a frame was cut off: {rest!r}")

    def _refused(self, status: int, body: bytes) -> None:
        message = f"HTTP {status} {body[:300].decode(errors='replace')}"
        if status in REFUSED:
            self.refusals.append(message)
        else:
            self._give_up(message)

    def _take(self, block: str, at_s: float) -> None:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and line[0] != ":")
        if "event" not in fields:
            return
        data = json.loads(fields["data"])
        frame = Frame(int(fields["id"]), fields["event"], data, at_s)
        self.request = self.request or data["id"]
        if data["id"] != self.request:
            self._give_up(f"a frame of another request arrived: {data['id']}")
        elif frame.event == "error" and data["error"]["code"] in BROKEN_OFF:
            self.breaks += 1
            self._last_id = frame.id
        elif (before := self._by_id.get(frame.id)) is not None and self.plan.idempotency_key:
            self._compare(before, frame)
        else:
            self._keep(frame)

    def _compare(self, before: Frame, again: Frame) -> None:
        """Check a repeated frame: a stream attached by its idempotency key begins at its first frame."""
        if before[:3] != again[:3]:
            self.anomalies.append(f"frame {again.id} arrived as {before[1:3]}, then as {again[1:3]}")

    def _keep(self, frame: Frame) -> None:
        self.frames.append(frame)
        self._by_id[frame.id] = frame
        self._last_id = frame.id
        if frame.event == "token":
            self._progress.add(max(0, frame.data["index"] - self._index))
            self._index = max(self._index, frame.data["index"])
        elif frame.event == "status":
            self.attempts = frame.data.get("attempt", self.attempts)


async def replay(http: httpx.AsyncClient, url: str, request: str) -> tuple[list[Frame], int]:
    """Replay a stream; return its frames, and the HTTP status of resuming after the last one."""
    frames: list[Frame] = []
    target = f"{url}/v1/inference/{request}/events"
    response = await http.get(target)
    for block in response.text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and line[0] != ":")
        if "event" in fields:
            frames.append(Frame(int(fields["id"]), fields["event"], json.loads(fields["data"]), 0.0))
    last = frames[-1].id if frames else 0
    after_last = await http.get(target, headers={"Last-Event-ID": str(last)})
    return frames, after_last.status_code
