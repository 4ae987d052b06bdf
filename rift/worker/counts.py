"""What a worker has done since it started, in plain numbers that its metrics show; nothing else reads them.

Output tokens are not counted one by one: each attempt knows how many it has.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rift.worker.attempt import Attempt

# How an attempt ended that put no end: it was released, or another one counts.
GIVEN_UP = "given_up"


class WorkerCounts:
    """`claims` are the jobs that were taken, `repeated` those of them that the broker had delivered before.

    `ended` counts attempts by the reason of their end.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.claims = 0
        self.repeated = 0
        self.ended: Counter[str] = Counter()
        self.prompt_tokens = 0
        self._output_tokens = 0
        self._running: set[Attempt] = set()

    @property
    def output_tokens(self) -> int:
        """The tokens that engines returned to attempts, those of running ones included."""
        return self._output_tokens + sum(attempt.new_tokens for attempt in self._running)

    def step(self) -> None:
        self.steps += 1

    def claim(self, deliveries: int) -> None:
        self.claims += 1
        self.repeated += deliveries > 1

    @contextmanager
    def attempt(self, attempt: Attempt) -> Iterator[None]:
        """Count an attempt and its tokens; it ends with the context."""
        self._running.add(attempt)
        try:
            yield
        finally:
            self._running.discard(attempt)
            self._output_tokens += attempt.new_tokens
            self.ended[attempt.reason or GIVEN_UP] += 1
