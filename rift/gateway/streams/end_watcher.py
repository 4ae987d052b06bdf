"""Who must know how requests end, whether their client is there or not: spent allowances, and limits."""

from collections.abc import Callable, Sequence
from typing import Any

from events.lifecycle import Life
from events.schema import Problem
from rift.gateway.completion import Completion
from rift.gateway.streams.lane_reader import Subscription


class EndWatcher(Subscription):
    """Follows a request, or a group, to its end."""

    def __init__(self, answers: Sequence[Completion], at_end: Callable[["EndWatcher"], None]) -> None:
        super().__init__(answers, None)
        self.attended = False
        self._at_end = at_end

    def break_off(self, problem: Problem) -> None:
        """There is no client to be told: what it follows has not ended."""

    def push(self, request: str, event: Any, life: Life, stored_at_ns: int) -> int:
        had_ended = self.ended
        size = super().push(request, event, life, stored_at_ns)
        if self.ended and not had_ended:
            self._at_end(self)
        return size
