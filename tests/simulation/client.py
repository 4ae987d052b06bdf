"""Clients of a simulated service: they send requests, read, disconnect, resume, cancel and retry.

Each client checks a frame as it arrives: its event is in the log, and it follows the previous frame without a
gap.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import anyio

from events.schema import RequestFinished, TokensGenerated
from rift.gateway.asgi.request import WHEN_GONE
from tests.simulation.ledger import Entry, Ledger
from tests.simulation.processes import MODEL, GatewayProcess
from tests.simulation.promise import hold

# A client without an answer retries at another gateway after at most RETRY_S, for longer than any deadline.
TRIES_MAX = 600
RETRY_S = 3.0

# The codes with which a gateway ends a stream whose request goes on.
BROKEN_OFF = ("gateway_stopping", "slow_reader", "log_unavailable")

# Longer than any deadline: a gateway that stays silent for this long is broken.
SILENT_S = 1500.0


class Chance(Protocol):
    """The part of `random.Random` that a client uses."""

    def random(self) -> float: ...
    def uniform(self, a: float, b: float, /) -> float: ...
    def randint(self, a: int, b: int, /) -> int: ...
    def choice(self, seq: Sequence[Any], /) -> Any: ...


class Call:
    """One HTTP request and its response, in memory."""

    def __init__(self, method: str, target: str, *, headers: dict[str, str], body: Any = None) -> None:
        path, _, query = target.partition("?")
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "extensions": {WHEN_GONE: self._when_gone},
        }
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.data = b""
        self.ended = False
        self.whole = False
        self._body: bytes | None = b"" if body is None else json.dumps(body).encode()
        self._gone = anyio.Event()
        self._at_gone: Callable[[], None] | None = None
        self._changed = anyio.Event()

    async def receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    def _when_gone(self, call: Callable[[], None]) -> None:
        self._at_gone = call
        if self._gone.is_set():
            call()

    async def send(self, message: Any) -> None:
        await anyio.lowlevel.checkpoint()
        if self._gone.is_set():
            return
        if message["type"] == "http.response.start":
            hold(self.status == 0, "a second status line")
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            hold(self.status > 0 and not self.whole, "a body without a status line, or after its end")
            self.data += message["body"]
            self.whole = not message["more_body"]
        self._wake()

    def is_over(self) -> None:
        self.ended = True
        self._wake()

    def leave(self) -> None:
        self._gone.set()
        if self._at_gone is not None:
            self._at_gone()

    def _wake(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()

    async def more(self) -> bool:
        """Wait for more of the response; return False at its end."""
        if not self.whole and not self.ended:
            with anyio.fail_after(SILENT_S):
                await self._changed.wait()
        return not self.whole and not self.ended

    def take(self) -> list["Frame"]:
        """Return the complete frames that arrived since the last call."""
        *blocks, self.data = self.data.split(b"\n\n")
        return [frame for block in blocks if (frame := _frame(block)) is not None]


class Frame(NamedTuple):
    number: int
    kind: str
    data: Any


def _frame(block: bytes) -> Frame | None:
    fields = dict(line.split(": ", 1) for line in block.decode().split("\n") if not line.startswith(":"))
    if "event" in fields:
        return Frame(int(fields["id"]), fields["event"], json.loads(fields["data"]))
    if "data" in fields:
        return Frame(0, "data", fields["data"])
    return None


class Client:
    """One client with one request.

    `outcome` is its result in one word. `was_not_accepted` means that the gateway denied accepting it.
    """

    def __init__(
        self,
        number: int,
        chance: Chance,
        key: str,
        ledger: Ledger,
        gateways: Callable[[], list[GatewayProcess]],
    ) -> None:
        self.outcome = "none"
        self.request: str | None = None
        self.was_not_accepted = False
        self.prompt = f"request {number:04}: say something"
        self._chance, self._ledger, self._gateways = chance, ledger, gateways
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        self._route = chance.choice(["stream", "stream", "stream", "whole", "chat", "background"])
        self.idempotency = f"key {number}" if chance.random() < 0.4 else None
        self._last_id = self._next_index = 0
        self._shown = ""
        self._leaves_after = chance.randint(0, 40) if chance.random() < 0.4 else None
        self._comes_back = chance.random() < 0.7
        self._cancels_after = chance.randint(0, 30) if chance.random() < 0.2 else None
        # A client that cancels asks for many tokens, so that the request is still running by then.
        is_short = self._cancels_after is None and chance.random() < 0.9
        self._tokens_max = chance.randint(1, 40) if is_short else chance.randint(100, 250)

    async def run(self) -> None:
        """Raises Violation."""
        for _ in range(TRIES_MAX):
            if await self._try():
                return
            await anyio.sleep(self._chance.uniform(0.1, RETRY_S))
        self.outcome = "gave up"

    async def _call(self, method: str, target: str, *, body: Any = None, **headers: str) -> Call | None:
        """Connect to some gateway; return None if no gateway listens."""
        listening = self._gateways()
        if not listening:
            return None
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        call = Call(method, target, headers={**self._headers, **named}, body=body)
        self._chance.choice(listening).serve(call)
        return call

    async def _try(self) -> bool:
        """Send the request, or read on; return True once there is nothing more to read."""
        if self.request is not None and self._route == "stream":
            call = await self._call(
                "GET", f"/v1/inference/{self.request}/events", last_event_id=str(self._last_id)
            )
            return call is not None and await self._follow(call)
        if self.request is not None:
            return await self._fetch()
        self._shown, self._next_index, self._last_id = "", 0, 0
        headers = {} if self.idempotency is None else {"idempotency_key": self.idempotency}
        path, body = self._body()
        call = await self._call("POST", path, body=body, **headers)
        if call is None:
            return False
        return await (self._follow(call) if body.get("stream") else self._whole(call))

    def _body(self) -> tuple[str, dict[str, Any]]:
        if self._route == "chat":
            messages = [{"role": "user", "content": self.prompt}]
            body = {"model": MODEL, "messages": messages, "max_tokens": self._tokens_max, "stream": True}
            return "/v1/chat/completions", body
        body = {"model": MODEL, "prompt": self.prompt, "parameters": {"max_tokens": self._tokens_max}}
        return "/v1/inference", body | {self._route: True} if self._route != "whole" else body

    # --- answers -------------------------------------------------------------------------------------

    async def _whole(self, call: Call) -> bool:
        while await call.more():
            pass
        if not call.whole:
            return self._lost()
        answer = json.loads(call.data)
        if call.status >= 400:
            return self._refused(call.status, answer["error"])
        if call.status == 202:
            self.request = answer["id"]
            return False
        self._check_answer(answer)
        return True

    async def _fetch(self) -> bool:
        """Fetch the object; return True once the request has ended."""
        call = await self._call("GET", f"/v1/inference/{self.request}")
        if call is None:
            return False
        while await call.more():
            pass
        if not call.whole or call.status == 503:
            return False
        hold(call.status == 200, f"{self.request}: {call.status} {call.data!r}")
        answer = json.loads(call.data)
        entry = self._entry(answer["id"])
        if answer["status"] in ("queued", "running"):
            hold(entry.text.startswith(answer["output"]), "a partial answer is not a prefix of the text")
            return False
        if "error" in answer:
            self.outcome = answer["error"]["code"]
        else:
            self._check_answer(answer)
        return True

    async def _follow(self, call: Call) -> bool:
        """Read a stream's frames, native or OpenAI's; disconnect or cancel if this client does so."""
        frames = 0
        while True:
            is_open = await call.more()
            if call.status >= 400:
                return await self._whole(call)
            if call.status == 204:
                hold(self._entry(self.request).ended_at_ns > 0, "204 before the end")
                return True
            for frame in call.take():
                frames += 1
                if self._show(frame):
                    return True
                if self._leaves_after is not None and frames > self._leaves_after:
                    call.leave()
                    self._leaves_after = None
                    self.outcome = "left"
                    return not self._comes_back or (self.request is None and self.idempotency is None)
                if self._cancels_after is not None and frames > self._cancels_after and self.request:
                    self._cancels_after = None
                    await self._call("DELETE", f"/v1/inference/{self.request}")
            if not is_open:
                return self._lost()

    def _lost(self) -> bool:
        """Handle a connection that ended before the answer. A client that cannot resume stops."""
        self.outcome = "lost"
        return self.request is None and self.idempotency is None

    def _refused(self, status: int, error: dict[str, Any]) -> bool:
        hold(status in (429, 500, 503, 504), f"{status} for a good request: {error}")
        self.outcome = error["code"]
        is_final = status in (500, 504) or (self.idempotency is None and self.request is None)
        self.was_not_accepted = is_final and self.outcome in ("log_unavailable", "log_full")
        return is_final

    # --- checking ---------------------------------------------------------------------------------------

    def _entry(self, request: str | None) -> Entry:
        self._ledger.catch_up()
        hold(request in self._ledger.entries, f"{request} was shown, but is not in the log")
        assert request is not None
        return self._ledger.entries[request]

    def _show(self, frame: Frame) -> bool:
        """Check one frame; return True if it is the last."""
        if frame.kind == "data":
            return self._show_openai(frame.data)
        if self.request is None:
            self.request = frame.data["id"]
        hold(frame.data["id"] == self.request, f"a frame of {frame.data['id']} to {self.request}")
        entry = self._entry(self.request)
        if frame.kind == "error" and frame.data["error"]["code"] in BROKEN_OFF:
            passed = entry.events[self._last_id : frame.number]
            missed = any(isinstance(event, TokensGenerated | RequestFinished) for event in passed)
            hold(not missed, f"a client that resumes after {frame} misses tokens")
            return False
        hold(frame.number <= len(entry.events), f"{frame} was shown, but is not in the log")
        if frame.kind == "token":
            self._show_tokens(entry, frame)
        self._last_id = max(self._last_id, frame.number)
        if frame.kind == "done":
            self._check_done(entry, frame.data)
        elif frame.kind == "error":
            hold(entry.ended_at_ns > 0, f"{frame} before the end")
            self.outcome = frame.data["error"]["code"]
        return frame.kind in ("done", "error")

    def _show_tokens(self, entry: Entry, frame: Frame) -> None:
        hold(frame.number > self._last_id, f"{frame} was shown before")
        event = entry.events[frame.number - 1]
        hold(isinstance(event, TokensGenerated), f"{frame} is {event} in the log")
        hold((event.index, event.text) == (frame.data["index"], frame.data["delta"]), f"{frame} is {event}")
        hold(event.index == self._next_index, f"{entry.id}: {event.index} shown, {self._next_index} was due")
        self._next_index += len(event.token_ids)
        self._shown += event.text

    def _show_openai(self, data: str) -> bool:
        if data == "[DONE]":
            return True
        chunk = json.loads(data)
        if "error" in chunk:
            self.outcome = chunk["error"]["code"]
            self.was_not_accepted = self.outcome == "log_unavailable" and self.idempotency is None
            return False
        self._ledger.catch_up()
        for choice in chunk["choices"]:
            self._shown += choice["delta"].get("content") or ""
        texts = [entry.text for entry in self._ledger.entries.values() if entry.prompt == self.prompt]
        hold(any(text.startswith(self._shown) for text in texts), "a chunk was shown, but is not in the log")
        if chunk["choices"] and chunk["choices"][0]["finish_reason"]:
            hold(self._shown in texts, "the stream ended before its text")
            self.outcome = "done"
        return False

    def _check_answer(self, answer: dict[str, Any]) -> None:
        entry = self._entry(answer["id"])
        self.request = entry.id
        hold(answer["output"] == entry.text, f"{entry.id}: the answer is not the text")
        self._shown, self._next_index = entry.text, len(entry.token_ids)
        self._check_done(entry, answer)

    def _check_done(self, entry: Entry, answer: dict[str, Any]) -> None:
        self.outcome = "done"
        hold(entry.ended_at_ns > 0, f"{entry.id}: done before the end")
        hold(self._shown == entry.text, f"{entry.id}: done, and not all was shown")
        hold(answer["usage"]["output_tokens"] == len(entry.token_ids), f"{entry.id}: usage {answer['usage']}")
        charge = self._ledger.charge_nanousd(entry)
        hold(answer["charge"]["nanousd"] == charge, f"{entry.id}: {charge} charged, {answer['charge']} shown")
