"""The state of one request as its client sees it, computed from its counted events.

Pure: the same events give the same state, live or read from the log a week later.
"""

from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from events.book import Book
from events.contracts import SECOND_NS
from events.intervals import Span, whole_seconds
from events.lifecycle import NEW, Life, advance
from events.money import usd
from events.pricing import charge_nanousd, is_chargeable
from events.schema import (
    AttemptReleased,
    AttemptStarted,
    Logprob,
    Price,
    Problem,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)
from rift.gateway.asgi.errors import HTTPError

# The HTTP status and message for each end that is not the client's doing.
FAILURES: dict[str, tuple[int, str]] = {
    "invalid": (400, "the request is invalid"),
    "expired": (504, "the request was not answered before its deadline"),
    "failed": (500, "the request failed; nothing is charged"),
    "poison": (500, "the request stopped its engine three times and is not retried; nothing is charged"),
    "revoked": (401, "the key was revoked while the request ran"),
}

# A gateway answered the client that the request was not accepted, so the client may have sent it again.
UNANSWERED = 503, Problem(code="unanswered", message="the log did not answer in time; nothing is charged")

# A failed request with one of these codes may succeed when it is sent again later.
UNAVAILABLE = {"model_unavailable": 503}


class Segment(msgspec.Struct):
    """Adjacent output of one kind, as far as it is generated. A tool call's text is its arguments.

    `encoded` is for the dialect, which shows each of the `logprobs` several times."""

    kind: Literal["reasoning", "text", "call"]
    pieces: list[str] = []
    logprobs: list[Logprob] = []
    encoded: list[bytes] = []
    id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Times(msgspec.Struct):
    """When each step of a request was stored: Unix time by the broker's clock."""

    accepted_ns: int | None = None
    started_ns: int | None = None
    first_token_ns: int | None = None
    finished_ns: int | None = None
    # By attempt: its start and its own last event.
    attempts: list[Span] = []

    def since_accepted_ms(self, step_ns: int | None) -> float | None:
        if step_ns is None or self.accepted_ns is None:
            return None
        return max(0, step_ns - self.accepted_ns) // 1000 / 1000


class Completion:
    """One request, as far as its events have counted. Only with `keep_text` does it hold the output."""

    def __init__(self, accepted: RequestAccepted, price: Price, *, keep_text: bool) -> None:
        self.accepted = accepted
        self.price = price
        self._keep_text = keep_text
        self.life: Life = NEW
        self.segments: list[Segment] = []
        self.logprobs: list[Logprob] = []
        # Logprobs of tokens that have not produced any output yet.
        self._pending_logprobs: list[Logprob] = []
        self._calls: dict[int, Segment] = {}
        self.simulated = False
        self.cached_tokens = 0
        self.reasoning_tokens = 0
        self._times = Times()

    @classmethod
    def of(cls, accepted: RequestAccepted, book: Book, *, keep_text: bool) -> "Completion":
        """Return a request without events. Raises HTTPError (410) if its content was removed."""
        if accepted.content:
            raise HTTPError(410, "the content of this request was removed", code="content_removed")
        price = book.price(accepted.model, accepted.price_version)
        assert price is not None, "an accepted request has a price"
        return cls(accepted, price, keep_text=keep_text)

    def begin(self, accepted_at_ns: int) -> None:
        """Take the acceptance before it is stored. Its estimated time stands until an attempt starts."""
        self.life = advance(NEW, self.accepted)
        self._times.accepted_ns = accepted_at_ns

    def add(self, event: Any, life: Life, stored_at_ns: int) -> None:
        """Take an event that counted, and the life after it."""
        self.life = life
        self._note_attempt(event, stored_at_ns)
        match event:
            case TokensGenerated():
                if self._keep_text:
                    self._keep(event)
                if self._times.first_token_ns is None:
                    self._times.first_token_ns = stored_at_ns
                    self.cached_tokens = event.cached_tokens
            case RequestAccepted():
                self._times.accepted_ns = stored_at_ns
            case AttemptStarted():
                self._times.accepted_ns = event.accepted_at_ns
                self.simulated = event.simulated
                if self._times.started_ns is None:
                    self._times.started_ns = stored_at_ns
            case RequestFinished():
                # The life was computed from the encrypted event, which has no error message.
                self.life = replace(life, error=event.error)
                self.reasoning_tokens = event.reasoning_tokens
        if life.phase == "ended":
            self._times.finished_ns = stored_at_ns
            if self.segments and self.segments[-1].kind == "text":
                self.segments[-1].logprobs += self._pending_logprobs
            self._pending_logprobs = []

    def _note_attempt(self, event: Any, stored_at_ns: int) -> None:
        match event:
            case AttemptStarted():
                self._times.attempts.append((stored_at_ns, stored_at_ns))
            case (
                TokensGenerated() | AttemptReleased(why="draining" | "host") | RequestFinished(attempt=str())
            ) if self._times.attempts:
                # A subscription that follows ends only has no attempt.
                start_ns, end_ns = self._times.attempts[-1]
                self._times.attempts[-1] = start_ns, max(end_ns, stored_at_ns)

    def _keep(self, event: TokensGenerated) -> None:
        self.logprobs += event.logprobs
        self._pending_logprobs += event.logprobs
        if event.reasoning:
            self._segment("reasoning").pieces.append(event.reasoning)
        if event.text:
            segment = self._segment("text")
            segment.pieces.append(event.text)
            segment.logprobs += self._pending_logprobs
        for delta in event.tool_calls:
            if delta.index not in self._calls:
                self._calls[delta.index] = Segment("call", id=delta.id or "", name=delta.name or "")
                self.segments.append(self._calls[delta.index])
            self._calls[delta.index].pieces.append(delta.arguments)
        if event.reasoning or event.text or event.tool_calls:
            self._pending_logprobs = []

    def _segment(self, kind: Literal["reasoning", "text"]) -> Segment:
        if not self.segments or self.segments[-1].kind != kind:
            self.segments.append(Segment(kind))
        return self.segments[-1]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments if segment.kind == "text")

    @property
    def reasoning(self) -> str:
        return "".join(segment.text for segment in self.segments if segment.kind == "reasoning")

    @property
    def calls(self) -> list[Segment]:
        return list(self._calls.values())

    @property
    def id(self) -> str:
        return self.accepted.request

    @property
    def first_token_ns(self) -> int | None:
        return self._times.first_token_ns

    @property
    def created(self) -> int:
        """Unix seconds of the acceptance, as the broker stored it."""
        return (self._times.accepted_ns or self._times.finished_ns or 0) // SECOND_NS

    @property
    def status(self) -> str:
        if self.life.phase != "ended":
            return "running" if self.life.attempt else "queued"
        if self.life.reason in FAILURES and self.life.reason != "revoked":
            return str(self.life.reason)
        return "cancelled" if self.life.reason in ("cancelled", "revoked") else "finished"

    def failure(self) -> tuple[int, Problem] | None:
        """Return the HTTP status and the problem of an end in failure, else None."""
        if self.life.phase != "ended":
            return None
        if self.life.wanted == "unanswered":
            return UNANSWERED
        if self.life.reason not in FAILURES:
            return None
        status, words = FAILURES[self.life.reason]
        problem = self.life.error or Problem(code=self.life.reason, message=words)
        return UNAVAILABLE.get(problem.code, status), problem

    @property
    def attempts(self) -> list[Span]:
        """When each attempt ran: from its start to its own last event, in Unix nanoseconds."""
        return self._times.attempts

    @property
    def seconds(self) -> int:
        """The seconds that its attempts ran, each attempt rounded up."""
        return whole_seconds(self._times.attempts)

    def charge(self) -> dict[str, Any] | None:
        """Return the charge, or None before the end, because it depends on how the request ends.

        The choices of a group share the charge for the prompt, so a single one of them has no charge either.
        Under plan per_second, requests that run at once share seconds, so only the most is known.
        """
        if self.life.phase != "ended":
            return None
        if self.accepted.plan == "per_second":
            seconds = self.seconds if is_chargeable(self.life) else 0
            return {"at_most_nanousd": seconds * (self.price.second_nanousd or 0), "final": False}
        if self.accepted.group:
            return None
        nanousd = charge_nanousd(self.life, self.price, cached_tokens=self.cached_tokens)
        return {"nanousd": nanousd, "usd": usd(nanousd)}

    def timing(self) -> dict[str, float | None]:
        """Return milliseconds from the acceptance to each later step; None for steps to come."""
        times = self._times
        return {
            "queue_ms": times.since_accepted_ms(times.started_ns),
            "ttft_ms": times.since_accepted_ms(times.first_token_ns),
            "total_ms": times.since_accepted_ms(times.finished_ns),
        }
