"""The metrics that vLLM keeps in a worker's process, in prometheus_client's own registry."""

from collections.abc import Callable, Iterable

from prometheus_client import REGISTRY, disable_created_metrics
from prometheus_client.core import Metric

PREFIX = "vllm:"

# Observed for each token or step, which costs too much (`rift/engines/vllm_stats.py`). They would stay empty.
NOT_KEPT = ("vllm:inter_token_latency_seconds", "vllm:iteration_tokens_total")


class EngineMetrics:
    """`update` makes the engine bring its metrics up to date."""

    def __init__(self, update: Callable[[], None]) -> None:
        self._update = update
        # A second sample for each counter and histogram, which says when it began.
        disable_created_metrics()  # type: ignore[no-untyped-call]

    def collect(self) -> Iterable[Metric]:
        self._update()
        return [
            metric
            for metric in REGISTRY.collect()
            if metric.name.startswith(PREFIX) and metric.name not in NOT_KEPT
        ]
