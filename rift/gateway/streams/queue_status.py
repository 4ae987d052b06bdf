"""The queue of requests that wait for a worker: its length, and the status that waiting clients receive.

    queued      a replica of the model is ready, but all its slots are busy
    starting    no replica is ready; with an estimate, once a start has been measured

Pure bookkeeping. The limits of a queue are in `admission/admission.py`.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Literal

import msgspec

from events import codec
from events.contracts import SECOND_NS
from events.fleet import Fleet
from events.schema import RequestAccepted


class Waiting(msgspec.Struct):
    """How many requests wait, and their bytes."""

    requests: int = 0
    size: int = 0


class QueueDepth:
    """The requests of one lane by model: those that wait for their first attempt, and those that run.

    A request waits from its admission, before it is stored, so that a burst is seen while it arrives.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._running: dict[str, set[str]] = {}
        # By model and account; the account "" stands for all.
        self._waiting: dict[tuple[str, str], Waiting] = {}

    def add(self, group: Iterable[RequestAccepted]) -> None:
        for accepted in group:
            if accepted.request not in self._sizes:
                size = len(codec.encode_event(accepted))
                self._sizes[accepted.request] = size
                self._count(accepted, 1, size)

    def remove(self, group: Iterable[RequestAccepted]) -> None:
        """Remove requests that have begun or ended, are no longer followed, or were refused after all."""
        for accepted in group:
            if (size := self._sizes.pop(accepted.request, None)) is not None:
                self._count(accepted, -1, -size)

    def begin(self, accepted: RequestAccepted) -> None:
        """Note that a request runs."""
        self.remove([accepted])
        self._running.setdefault(accepted.model, set()).add(accepted.request)

    def end(self, accepted: RequestAccepted) -> None:
        """Note that a request has ended, or is no longer followed."""
        self.remove([accepted])
        self._running.get(accepted.model, set()).discard(accepted.request)

    def length(self, model: str, account: str = "") -> tuple[int, int]:
        """Return how many requests wait for a model, and their bytes; only those of `account`, if given."""
        waiting = self._waiting.get((model, account), Waiting())
        return waiting.requests, waiting.size

    def running(self, model: str) -> int:
        """Return how many requests of a model run."""
        return len(self._running.get(model, ()))

    def waiting(self) -> dict[tuple[str, ...], int]:
        """Return how many requests wait for each model."""
        waiting: dict[tuple[str, ...], int] = {
            (model,): each.requests for (model, account), each in self._waiting.items() if not account
        }
        return dict.fromkeys(((model,) for model in self._running), 0) | waiting

    def waiting_bytes(self) -> int:
        """Return the bytes that wait for the model for which most wait."""
        return max((each.size for (_, account), each in self._waiting.items() if not account), default=0)

    def under_way(self) -> dict[tuple[str, ...], int]:
        """Return how many requests of each model run."""
        return {(model,): len(running) for model, running in self._running.items()}

    def _count(self, accepted: RequestAccepted, requests: int, size: int) -> None:
        for account in ("", accepted.account):
            waiting = self._waiting.setdefault((accepted.model, account), Waiting())
            waiting.requests += requests
            waiting.size += size
            if not waiting.requests:
                del self._waiting[accepted.model, account]


class Status(msgspec.Struct, frozen=True):
    """The status of a waiting request. `estimate_ms` is the time until a replica is ready, in whole seconds,
    or None if it is unknown."""

    name: Literal["queued", "starting"]
    estimate_ms: int | None = None


def status(fleet: Fleet, model: str, now_ns: int) -> Status:
    """Return the status of requests that wait for a model. `now_ns` is the broker's time."""
    if fleet.is_ready(model):
        return Status("queued")
    start_ns = fleet.start_ns(model)
    if start_ns is None and (decided := fleet.decided.get(model)) is not None:
        start_ns = decided.inputs.get("replicas.start_ns")
    if start_ns is None:
        return Status("starting")
    began_ns = fleet.began_at_ns(model)
    gone_ns = 0 if began_ns is None else max(0, now_ns - began_ns)
    left_ns = max(0, start_ns - gone_ns)
    return Status("starting", -(-left_ns // SECOND_NS) * 1000)


class QueueStatus:
    """The status of waiting requests by the current fleet. `nudge` wakes the clients of some models."""

    def __init__(
        self, fleet: Fleet, nudge: Callable[[Collection[str]], None], now_ns: Callable[[], int]
    ) -> None:
        self._fleet = fleet
        self._nudge = nudge
        self._now_ns = now_ns
        self._ready: frozenset[str] = frozenset()

    def status(self, model: str) -> Status:
        return status(self._fleet, model, max(self._now_ns(), self._fleet.at_ns))

    def refresh(self) -> None:
        """After a change of the fleet, wake the clients of models that became ready or are no longer."""
        ready = frozenset(model for model in self._fleet.replicas if self._fleet.is_ready(model))
        models = self._ready ^ ready
        self._ready = ready
        if models:
            self._nudge(models)
