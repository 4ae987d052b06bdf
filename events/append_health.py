"""For how long the log has stored nothing of what one connection appends, by stream.

A broker whose disk is full or read-only answers questions, but no append. Each process therefore measures its
own appends: an append that is stored proves that the stream takes records, and nothing else does.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from events.clock import now_s
from events.contracts import SECOND_NS
from events.log import LogFull, OutcomeUnknown


class _Stream(msgspec.Struct):
    """When an append was last stored, and when each append under way, and the first that failed since, began.

    An append that began before the last stored one proves nothing: its own answer was lost.
    """

    stored_at_s: float = -math.inf
    failed_since_s: float | None = None
    pending: dict[int, float] = {}
    begun: int = 0

    @property
    def since_s(self) -> float | None:
        if self.failed_since_s is not None:
            return self.failed_since_s
        return next((at_s for at_s in self.pending.values() if at_s >= self.stored_at_s), None)


class AppendHealth:
    """`took` is called for each append that was stored, with its nanoseconds."""

    def __init__(self) -> None:
        self.took: Callable[[int], None] = lambda took_ns: None
        self._streams: dict[str, _Stream] = {}

    @contextmanager
    def measured(self, stream: str) -> Iterator[None]:
        """Measure one append, from its begin to its outcome."""
        number = self.begin(stream)
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.end(stream, number, error)

    def begin(self, stream: str) -> int:
        """Note that an append has begun, and return its number for `end`."""
        state = self._streams.setdefault(stream, _Stream())
        number = state.begun = state.begun + 1
        state.pending[number] = now_s()
        return number

    def end(self, stream: str, number: int, error: BaseException | None) -> None:
        """Note the outcome of an append. A refusal for any reason but space or silence proves nothing."""
        state = self._streams[stream]
        began_at_s = state.pending.pop(number)
        if error is None:
            state.stored_at_s = now_s()
            state.failed_since_s = None
            self.took(int((state.stored_at_s - began_at_s) * SECOND_NS))
        elif isinstance(error, OutcomeUnknown | LogFull) and began_at_s >= state.stored_at_s:
            earlier_s = state.failed_since_s
            state.failed_since_s = began_at_s if earlier_s is None else min(earlier_s, began_at_s)

    def unwritable_s(self, stream: str) -> float:
        """Return for how long appends have waited or failed without one that was stored; 0 if none has."""
        state = self._streams.get(stream)
        since_s = None if state is None else state.since_s
        return 0.0 if since_s is None else now_s() - since_s
