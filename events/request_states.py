"""The lives of the requests that one reader follows.

The reader passes every event of its subjects to `fold`, in log order; `fold` returns whether it counted. An
event on a subject that is not its request's address is ignored.
"""

from typing import Any

from events.codec import Unreadable
from events.ids import parse_request_id
from events.lifecycle import NEW, Life, advance
from events.schema import AttemptStarted
from events.subjects import Address


class RequestStates:
    """Lives by request. Events of a request that was not passed to `follow` are ignored."""

    def __init__(self) -> None:
        self._lives: dict[str, Life] = {}
        self._at: dict[str, Address] = {}
        self._request_of: dict[str, str] = {}

    def follow(self, request: str, life: Life = NEW) -> None:
        parsed = parse_request_id(request)
        assert parsed is not None, f"{request!r} is not a request id"
        self._at[request] = parsed.at
        self._set(request, life)

    def forget(self, request: str) -> None:
        if (life := self._lives.pop(request, None)) is None:
            return
        del self._at[request]
        for attempt in life.seen:
            self._request_of.pop(attempt, None)

    def __contains__(self, request: object) -> bool:
        return request in self._lives

    def __getitem__(self, request: str) -> Life:
        return self._lives[request]

    def request_of(self, event: Any) -> str | None:
        """Return the request of an event (or an unreadable one), followed or not."""
        request: str | None = getattr(event, "request", None)
        if request is None:
            request = self._request_of.get(getattr(event, "attempt", None) or "")
        return request

    def fold(self, event: Any, at: Address) -> tuple[str, Life] | None:
        """Return the request and its new life if the event counted, else None."""
        request = self.request_of(event)
        if request is None or self._at.get(request) != at or isinstance(event, Unreadable):
            return None
        before = self._lives[request]
        after = advance(before, event)
        if after is before:
            return None
        self._set(request, after, event)
        return (request, after) if after.counted != before.counted else None

    def _set(self, request: str, life: Life, event: Any = None) -> None:
        self._lives[request] = life
        if isinstance(event, AttemptStarted):
            self._request_of[event.attempt] = request
        elif event is None:
            self._request_of.update(dict.fromkeys(life.seen, request))
