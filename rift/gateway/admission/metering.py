"""The cost of a request of a limited account, computed from its events."""

from collections.abc import Iterable, Iterator
from typing import Any

from events.intervals import Span
from events.lifecycle import Life
from events.pricing import charge_nanousd, is_chargeable
from events.schema import (
    AttemptReleased,
    AttemptStarted,
    Price,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)
from rift.gateway.completion import Completion


class MeteredCompletion(Completion):
    """A completion without text that knows its cost once it has ended.

    Under the plan `per_second` the cost is the times in which attempts ran, else nano-USD.
    """

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
                start_ns, end_ns = self._attempts[-1]
                self._attempts[-1] = start_ns, max(end_ns, stored_at_ns)

    @property
    def is_by_second(self) -> bool:
        return self.accepted.plan == "per_second"

    @property
    def ran(self) -> list[Span]:
        return self._attempts if self.is_by_second and is_chargeable(self.life) else []

    def nanousd(self, *, with_prompt: bool) -> int:
        """Return the charge for tokens. `with_prompt` is False if another choice was charged the prompt."""
        if self.is_by_second:
            return 0
        return charge_nanousd(
            self.life, self.price, cached_tokens=self.cached_tokens, with_prompt=with_prompt
        )


def charges(answers: Iterable[MeteredCompletion]) -> Iterator[tuple[MeteredCompletion, int]]:
    """Yield the ended answers of a group with their nano-USD.

    They come in the order of their ends, and the first chargeable one pays for the prompt.
    """
    with_prompt = True
    for answer in answers:
        yield answer, answer.nanousd(with_prompt=with_prompt)
        with_prompt = with_prompt and not is_chargeable(answer.life)
