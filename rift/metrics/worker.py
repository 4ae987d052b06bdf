"""The metrics of a worker: what its replica holds and has done, and its engine's own."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from events.log import Log
from events.schema import ReplicaStarting
from rift.metrics import listener
from rift.metrics.address import Address
from rift.metrics.engine import EngineMetrics
from rift.metrics.families import Collector, Figure, Histogram, Values, process
from rift.worker.claims import Load
from rift.worker.serving import Serving

STATES = ("starting", "ready", "draining")

# An append is a round trip to the broker and its fsync: 1 ms on a local disk, more with three copies. One
# that takes 2 s has failed, and is repeated.
APPEND_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


@asynccontextmanager
async def served(
    address: Address | None, log: Log, replica: ReplicaStarting, serving: Serving
) -> AsyncIterator[str]:
    """Serve the metrics while the context is open, and yield their address, "" if there is none."""
    async with listener.serving(address, collectors(log, replica, serving)) as bound:
        yield str(bound or "")


def collectors(log: Log, replica: ReplicaStarting, serving: Serving) -> Sequence[Collector]:
    """Return the collectors of a worker process, and time the appends of its connection from now on."""
    model = (replica.model,)
    appends = Histogram(
        "rift_worker_append_seconds",
        "Time of each record until the log had stored it.",
        APPEND_BOUNDS_S,
    )
    log.time_appends(appends.series().observe)

    def state() -> Mapping[Values, float]:
        return {(each,): each == serving.state for each in STATES}

    def load() -> Load:
        return sum((worker.claims.load for worker in serving.workers), Load())

    def requests() -> Mapping[Values, float]:
        current = load()
        return {(*model, "running"): current.running, (*model, "waiting"): current.waiting}

    def slots(name: str) -> Mapping[Values, float]:
        return {model: getattr(serving.slots, name, 0)}

    def count(name: str) -> Mapping[Values, float]:
        return {model: getattr(serving.slots.counts, name) if serving.slots else 0}

    def ends() -> Mapping[Values, float]:
        return {(*model, end): n for end, n in serving.slots.counts.ended.items()} if serving.slots else {}

    def counter(name: str, help: str, attribute: str) -> Figure:
        return Figure(name, help, lambda: count(attribute), ("model",), kind="counter")

    return [
        process(),
        Figure(
            "rift_worker_info",
            "Always 1. Its labels name the replica.",
            lambda: {(replica.replica, replica.model, replica.engine, replica.hardware): 1},
            ("replica", "model", "engine", "hardware"),
        ),
        Figure("rift_worker_state", "1 for the state of the replica, 0 for the others.", state, ("state",)),
        Figure("rift_worker_slots", "Requests that may run at once.", lambda: slots("total"), ("model",)),
        Figure("rift_worker_slots_used", "Slots that hold a job.", lambda: slots("used"), ("model",)),
        Figure(
            "rift_worker_requests",
            "Jobs that are held: running in the engine, or waiting to begin.",
            requests,
            ("model", "state"),
        ),
        Figure(
            "rift_worker_engine_tokens",
            "Tokens that the engine holds: the prompts and the output so far of running requests.",
            lambda: {model: load().tokens},
            ("model",),
        ),
        counter("rift_worker_claims_total", "Jobs that were taken.", "claims"),
        counter("rift_worker_redeliveries_total", "Jobs that the broker had delivered before.", "repeated"),
        Figure(
            "rift_worker_attempts_total",
            "Attempts by their end: a finish reason, or given_up.",
            ends,
            ("model", "end"),
            kind="counter",
        ),
        counter("rift_worker_prompt_tokens_total", "Prompt tokens given to the engine.", "prompt_tokens"),
        counter("rift_worker_output_tokens_total", "Tokens that the engine returned.", "output_tokens"),
        counter("rift_worker_engine_steps_total", "Steps of the engine with output.", "steps"),
        appends,
        EngineMetrics(lambda: serving.engine.log_metrics() if serving.engine else None),
    ]
