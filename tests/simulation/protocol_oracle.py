"""The promises of the protocol, checked without the table of `events/lifecycle.py`."""

from collections.abc import Mapping
from typing import Any, Protocol

from events.lifecycle import GRACEFUL, Life
from events.pricing import charge_nanousd, is_chargeable
from events.schema import (
    AttemptReleased,
    AttemptStarted,
    CancelRequested,
    Price,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)
from tests.simulation.promise import hold

PRICE = Price(model="model-a", prompt_nanousd=0, output_nanousd=1)


class Writer(Protocol):
    """The writer of an attempt: the position it had read when it began, and its own text."""

    knows: int
    text: list[int]


class Oracle:
    """Checks each event that the fold under test counts. `text` is all that a client can have been shown."""

    def __init__(self, writers: Mapping[str, Writer]) -> None:
        self._writers = writers
        self.chain: list[str] = []
        self.text: list[int] = []
        self.is_accepted = self.is_ended = self.is_released = False
        self._is_cancel_requested = self._is_cancelled = False
        self._knowledge_needed = 0
        self._deaths = 0
        self._graceful = True

    def judge(self, event: Any, before: Life, after: Life, position: int) -> None:
        if isinstance(event, CancelRequested) and event.attempt is None and self.is_accepted:
            self._is_cancel_requested = True
        counted = after.counted - before.counted
        hold(counted in (0, 1), "an event counts once or not at all: its number is the stream's id")
        if not counted:
            hold(_material(before) == _material(after), f"{event} changed the life and did not count")
            return
        hold(not self.is_ended, f"{event} counted after the end")
        hold(self.is_accepted != isinstance(event, RequestAccepted), f"{event}: one acceptance, and first")
        self._count(event, position)
        if after.phase == "ended":
            self._end(event, after)
        idle = self.is_released or not self.chain
        hold(self.is_ended or not (self._is_cancelled and idle), "cancelled, idle, and not ended")
        hold(after.next_index == len(self.text), "usage is not the number of tokens that were shown")
        hold(after.deaths == self._deaths, f"{after.deaths} deaths counted of {self._deaths}")

    def _count(self, event: Any, position: int) -> None:
        match event:
            case RequestAccepted():
                self.is_accepted = True
            case AttemptStarted():
                hold(event.attempt not in self.chain, f"{event.attempt} started twice")
                knows = self._writers[event.attempt].knows
                hold(knows >= self._knowledge_needed, f"{event.attempt} did not know what had counted")
                self._deaths += bool(self.chain) and not self._graceful
                self.chain.append(event.attempt)
                self.is_released = self._graceful = False
                self._knowledge_needed = position + 1
            case TokensGenerated():
                self._is_current(event)
                hold(event.index == len(self.text), f"{event.index} shown where {len(self.text)} was due")
                self.text += event.token_ids
                self._knowledge_needed = position + 1
            case AttemptReleased():
                self._is_current(event)
                self.is_released, self._graceful = True, event.why in GRACEFUL
            case CancelRequested():
                hold(event.attempt is None, "a cancellation of one attempt counted for the request")
                self._is_cancelled = True
            case RequestFinished(attempt=str()):
                self._is_current(event)

    def _is_current(self, event: Any) -> None:
        hold(self.chain[-1:] == [event.attempt], f"{event} is not of the attempt that started last")
        hold(not self.is_released, f"{event} counted after the attempt was released")

    def _end(self, event: Any, after: Life) -> None:
        self.is_ended = True
        if isinstance(event, RequestFinished) and event.attempt is not None:
            writer = self._writers[event.attempt]
            hold(writer.text == self.text, "the end was written by an attempt with a different text")
        elif not isinstance(event, RequestFinished):
            hold(self._is_cancel_requested, "cancelled without a request to cancel")
        billed = charge_nanousd(after, PRICE)
        hold(billed == (len(self.text) if is_chargeable(after) else 0), "the bill does not match the text")


def _material(life: Life) -> tuple[object, ...]:
    return life.phase, life.attempt, life.live, life.next_index, life.attempts, life.wanted, life.released
