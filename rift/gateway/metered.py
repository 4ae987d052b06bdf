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
from rift.gateway.answer import Answer

SECOND_NS = 1_000_000_000


class Metered(Answer):
    """An answer without its text. Under the plan per_second each attempt's seconds are rounded up alone: a
    little more than the invoice, which unites what overlaps."""

    def __init__(self, accepted: RequestAccepted, price: Price) -> None:
        super().__init__(accepted, price, keep_text=False)
        self._seconds = 0
        self._from_ns = self._to_ns = 0

    def add(self, event: Any, life: Life, stored_at_ns: int) -> None:
        super().add(event, life, stored_at_ns)
        match event:
            case AttemptStarted():
                self._seconds, self._from_ns = self.seconds, stored_at_ns
                self._to_ns = stored_at_ns
            case (
                TokensGenerated() | AttemptReleased(why="draining" | "host") | RequestFinished(attempt=str())
            ):
                self._to_ns = max(self._to_ns, stored_at_ns)

    @property
    def seconds(self) -> int:
        return self._seconds - (self._from_ns - self._to_ns) // SECOND_NS

    @property
    def nanousd(self) -> int:
        """The charge of a request that has ended."""
        if self.accepted.plan == "per_second":
            return self.seconds * (self.price.second_nanousd or 0) if is_chargeable(self.life) else 0
        return charge_nanousd(self.life, self.price, cached_tokens=self.cached_tokens)
