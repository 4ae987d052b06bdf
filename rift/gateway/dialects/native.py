"""Frames of the native stream: `id`, `event` and `data` on every one.

An id is the number of the request's events that counted so far, so it names a point in the log, says
nothing of anybody else's traffic, and is the same from every gateway, live or later.
"""

import re
from typing import Any

import msgspec

from events.schema import AttemptStarted, TokensGenerated
from rift.gateway.asgi.errors import HTTPError, error_type
from rift.gateway.asgi.request import Request
from rift.gateway.completion import Completion

KEEP_ALIVE = b": keep-alive\n\n"

# How long a browser waits before it resumes, milliseconds. Inside the first event: alone, before any, it
# would be an event without data, which some clients stumble over.
RETRY = b"retry: 500\n"

_encode = msgspec.json.Encoder().encode


class NativeStream:
    keep_alive = KEEP_ALIVE
    tells_status = True

    def __init__(self, answer: Completion) -> None:
        self._answer = answer
        self._id = _encode(answer.id)
        self._first = True

    def waiting(self, name: str, estimate_ms: int | None) -> bytes:
        """Tell that the request waits: `queued`, or `starting` while the model has no ready replica."""
        estimate = {} if estimate_ms is None else {"estimate_ms": estimate_ms}
        return self._frame(b"status", _encode({"id": self._answer.id, "status": name, **estimate}))

    def event(self, event: Any, answer: Completion) -> bytes:
        """Return the frame of an event that the answer has just taken."""
        if isinstance(event, TokensGenerated):
            data = b'{"id":%b,"index":%d,"delta":%b' % (self._id, event.index, _encode(event.text))
            if event.reasoning:
                data += b',"reasoning":' + _encode(event.reasoning)
            return self._frame(b"token", data + b"}")
        if failure := answer.failure():
            status, problem = failure
            return self._frame(b"error", _encode({"id": answer.id, **error_body(status, problem)}))
        if answer.life.phase == "ended":
            return self._frame(b"done", _encode(answer.inference(output=False)))
        if isinstance(event, AttemptStarted):
            data = _encode({"id": answer.id, "status": "running", "attempt": answer.life.attempts})
            return self._frame(b"status", data)
        return b""

    def broken_off(self, problem: Any, after: int) -> bytes:
        """The stream ends behind event `after`, the request does not: `resume` is where it goes on."""
        resume = f"/v1/inference/{self._answer.id}/events?after={after}"
        shown = {"id": self._answer.id, "resume": resume, **error_body(503, problem)}
        return self._frame(b"error", _encode(shown), after)

    def _frame(self, kind: bytes, data: bytes, at: int | None = None) -> bytes:
        counted = self._answer.life.counted if at is None else at
        frame = b"id: %d\nevent: %b\ndata: %b\n\n" % (counted, kind, data)
        if self._first:
            self._first = False
            return RETRY + frame
        return frame


def error_body(status: int, problem: Any) -> dict[str, Any]:
    return {
        "error": {
            "message": problem.message,
            "type": error_type(status),
            "param": problem.param,
            "code": problem.code,
        }
    }


def event_id(request: Request) -> int:
    """Return the number of the last event that the client has; 0: none. Raises HTTPError."""
    text = request.header(b"last-event-id") or request.query().get("after") or "0"
    if not re.fullmatch(r"\d{1,9}", text):
        message = f"after: {text!r} is no event id of this service"
        raise HTTPError(400, message, code="invalid_event_id", param="after")
    return int(text)
