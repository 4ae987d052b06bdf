"""What a request of a limited account cost, as its events tell."""

from typing import Any

from events.charge import charge_nanousd, is_chargeable
from events.lifecycle import Life
from events.schema import (
    AttemptReleased,
    AttemptStarted,
    Price,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)
from events.spans import Span
from rift.gateway.answer import Answer


class Metered(Answer):
    """An answer without its text. What of it is charged, once it has ended: under the plan per_second the
    times in which its attempts ran, else nano-USD."""

    def __init__(self, accepted: RequestAccepted, price: Price) -> None:
        super().__init__(accepted, price, keep_text=False)
        self._attempts: list[Span] = []

    def add(self, event: Any, life: Life, stored_at_ns: int) -> None:
        super().add(event, life, stored_at_ns)
        match event:
            case AttemptStarted():
                self._attempts.append((stored_at_ns, stored_at_ns))
            case (
                TokensGenerated() | AttemptReleased(why="draining" | "host") | RequestFinished(attempt=str())
            ):
                began, until = self._attempts[-1]
                self._attempts[-1] = began, max(until, stored_at_ns)

    @property
    def is_by_second(self) -> bool:
        return self.accepted.plan == "per_second"

    @property
    def ran(self) -> list[Span]:
        return self._attempts if self.is_by_second and is_chargeable(self.life) else []

    @property
    def nanousd(self) -> int:
        if self.is_by_second:
            return 0
        return charge_nanousd(self.life, self.price, cached_tokens=self.cached_tokens)
