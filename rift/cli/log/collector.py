"""An OpenTelemetry collector that receives spans by OTLP over HTTP, in JSON."""

import json
import os
from typing import Any, Self
from urllib.parse import unquote

import anyio
import httpx

from events.errors import reason
from rift.cli.output import CommandFailed
from rift.errors import printable

# The path of traces below a collector's base address, by the standard.
PATH = "/v1/traces"
# The answers after which the standard lets a client send the same message again.
BUSY = (429, 502, 503, 504)
# A collector that restarts is back within the pauses: 1, 2, 4 and 8 s unless it names others.
TRIES_MAX = 5
PAUSE_MAX_S = 30.0
SEND_S = 30.0
# An answer has a few words about what was rejected; a web page's beginning tells as much as the whole.
ANSWER_BYTES_MAX = 64 * 1024
SHOWN_CHARACTERS = 200


class Collector:
    """`shown` is its address without a password. `complaint` is what it said of spans that it rejected,
    for the end of a line."""

    def __init__(self, url: httpx.URL, headers: dict[str, str]) -> None:
        self._url = url
        self.shown = url.copy_with(userinfo=b"")
        self.complaint = ""
        self._headers = headers
        self._rejected = 0

    @classmethod
    def at(cls, text: str) -> Self:
        """Return the collector at an address. Raises CommandFailed."""
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host:
            raise CommandFailed(f"--otlp: must be an address like http://127.0.0.1:4318, got {text!r}")
        if url.path == "/":
            url = url.copy_with(path=PATH)
        return cls(url, _headers(os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", "")))

    async def send(self, message: dict[str, Any]) -> None:
        """Send one message, again if the collector is busy. Raises CommandFailed."""
        content = json.dumps(message).encode()
        async with httpx.AsyncClient(timeout=SEND_S, headers=self._headers) as client:
            for tries in range(1, TRIES_MAX + 1):
                pause_s = float(2 ** (tries - 1))
                try:
                    with anyio.fail_after(SEND_S):
                        status, answer, wait = await _post(client, self._url, content)
                except (httpx.HTTPError, TimeoutError) as error:
                    problem = f"does not answer: {reason(error)}"
                else:
                    if 200 <= status < 300:
                        return self._note(answer)
                    problem = f"answered {status}: {_shown(answer)}"
                    if status not in BUSY:
                        raise CommandFailed(
                            f"the collector at {self.shown} {problem}; --otlp needs its address for OTLP "
                            f"over HTTP, which usually has port 4318 and path {PATH}"
                        )
                    pause_s = float(wait) if wait.isdecimal() else pause_s
                if tries < TRIES_MAX:
                    await anyio.sleep(min(pause_s, PAUSE_MAX_S))
        raise CommandFailed(f"the collector at {self.shown} {problem}, after {TRIES_MAX} tries")

    def _note(self, answer: bytes) -> None:
        try:
            partial = json.loads(answer or b"{}")["partialSuccess"]
            self._rejected += int(partial.get("rejectedSpans", 0))
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
            # Most collectors answer with an empty message.
            return
        if self._rejected:
            words = printable(str(partial.get("errorMessage", "")))[:SHOWN_CHARACTERS]
            self.complaint = f", which rejected {self._rejected} of the spans: {words}"


async def _post(client: httpx.AsyncClient, url: httpx.URL, content: bytes) -> tuple[int, bytes, str]:
    """Return the status, the beginning of the answer, and its `retry-after`. Raises httpx.HTTPError."""
    answer = b""
    headers = {"content-type": "application/json"}
    async with client.stream("POST", url, content=content, headers=headers) as response:
        async for chunk in response.aiter_bytes():
            answer += chunk
            if len(answer) > ANSWER_BYTES_MAX:
                break
        return response.status_code, answer, response.headers.get("retry-after", "")


def _headers(text: str) -> dict[str, str]:
    """Return the headers of `NAME=VALUE,…`, whose values are percent-encoded, as the standard says."""
    pairs = (pair.partition("=") for pair in text.split(",") if "=" in pair)
    return {name.strip(): unquote(value.strip()) for name, _, value in pairs}


def _shown(answer: bytes) -> str:
    return printable(answer.decode(errors="replace"))[:SHOWN_CHARACTERS] or "no reason"
