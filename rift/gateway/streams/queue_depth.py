"""How many requests wait for a worker, of each model: those of one lane, until an attempt takes them. Pure
bookkeeping; what a queue may hold is said in `admission.py`."""

from collections.abc import Iterable

from events import codec
from events.schema import RequestAccepted


class QueueDepth:
    """A request counts from the moment at which it is let in, so that a crowd that comes at once is seen."""

    def __init__(self) -> None:
        self._waiting: dict[str, dict[str, tuple[str, int]]] = {}

    def add(self, group: Iterable[RequestAccepted]) -> None:
        for accepted in group:
            waiting = self._waiting.setdefault(accepted.model, {})
            if accepted.request not in waiting:
                waiting[accepted.request] = accepted.account, len(codec.encode_event(accepted))

    def remove(self, group: Iterable[RequestAccepted]) -> None:
        """They are begun, have ended, are followed no more, or were not let in after all."""
        for accepted in group:
            self._waiting.get(accepted.model, {}).pop(accepted.request, None)

    def length(self, model: str, account: str | None = None) -> tuple[int, int]:
        """Return how many requests wait for a model, and their bytes: all, or an account's."""
        sizes = [size for owner, size in self._waiting.get(model, {}).values() if account in (None, owner)]
        return len(sizes), sum(sizes)
