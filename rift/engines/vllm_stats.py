"""vLLM's own metrics, for a few numbers a step.

vLLM's front end updates its metrics for each token: 3.5 µs at 64 streams, 19 µs at one, where a worker takes
some 30 and 300 µs for everything. This module notes a step in one call and a request at its first and last
token, and passes the sums to vLLM's logger at a scrape: 0.05 µs a token at 64 streams, 0.2 at 8, 2 at one. So
metrics of single tokens and steps are not kept; `rift/metrics/engine.py` names them.
"""

from typing import Any

from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import IterationStats, LoRARequestStates, RequestStateStats, SchedulerStats

REASONS = {str(reason): reason for reason in FinishReason}


class _Request:
    def __init__(self, request: Any) -> None:
        self.prompt_tokens = len(request.prompt_token_ids)
        self.max_tokens = request.sampling_params.max_tokens
        self.cached_tokens = 0
        self.times = RequestStateStats(arrival_time=request.arrival_time)


class VllmStats:
    """Fills `logger`, vLLM's manager of stat loggers."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._requests: dict[str, _Request] = {}
        self._loras = LoRARequestStates()
        self._iteration = IterationStats()
        self._scheduler: SchedulerStats | None = None
        self._queried = 0
        self._hit = 0
        # Output tokens of ended requests, and those of all requests that the logger has.
        self._ended_tokens = 0
        self._logged_tokens = 0
        self._stepped_at_s = 0.0

    def begin(self, request: Any) -> None:
        """Note an `EngineCoreRequest` before the engine has it."""
        self._requests[request.request_id] = _Request(request)

    def step(self, outputs: Any) -> None:
        """Note a step's `EngineCoreOutputs`."""
        self._stepped_at_s = outputs.timestamp
        if (scheduler := outputs.scheduler_stats) is not None:
            self._scheduler = scheduler
            self._queried += scheduler.prefix_cache_stats.queries
            self._hit += scheduler.prefix_cache_stats.hits
        for output in outputs.outputs:
            if output.prefill_stats is not None or output.events is not None:
                self._note(output)

    def _note(self, output: Any) -> None:
        """Note a first token, or events of the scheduler."""
        if (request := self._requests.get(output.request_id)) is None:
            return
        is_first = not request.times.first_token_ts
        if output.prefill_stats is not None and is_first:
            request.cached_tokens = output.prefill_stats.num_cached_tokens
        self._iteration.iteration_timestamp = _now_s()
        self._iteration.update_from_output(
            output, self._stepped_at_s, is_first, request.times, self._loras, None
        )

    def end(self, name: str, tokens: int, finish: str | None) -> None:
        """Note that a request has ended with its output tokens; without `finish`, it was aborted."""
        request = self._requests.pop(name)
        self._ended_tokens += tokens
        if not request.times.first_token_ts:
            return
        iteration = self._iteration
        iteration.iteration_timestamp = _now_s()
        request.times.num_generation_tokens = tokens
        request.times.last_token_ts = self._stepped_at_s
        iteration.update_from_finished_request(
            REASONS.get(finish or "", FinishReason.ABORT),
            name,
            request.prompt_tokens,
            request.max_tokens,
            request.times,
            request.cached_tokens,
        )
        iteration.max_num_generation_tokens_iter.append(tokens)
        iteration.n_params_iter.append(1)

    def log(self, running_tokens: int) -> None:
        """Pass on what was noted since the last call. `running_tokens` are those of requests under way."""
        tokens = self._ended_tokens + running_tokens
        iteration = self._iteration
        iteration.num_generation_tokens = tokens - self._logged_tokens
        self._logged_tokens = tokens
        iteration.inter_token_latencies_iter.clear()
        self._iteration = IterationStats()
        if (scheduler := self._scheduler) is not None:
            scheduler.prefix_cache_stats.queries = self._queried
            scheduler.prefix_cache_stats.hits = self._hit
            self._queried = self._hit = 0
        self._scheduler = None
        self._logger.record(scheduler_stats=scheduler, iteration_stats=iteration)


def _now_s() -> float:
    """Return the time by the clock with which vLLM stamps arrivals."""
    return float(IterationStats().iteration_timestamp)
