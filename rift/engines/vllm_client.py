"""Runs requests in vLLM's engine process, and takes their output where vLLM reads it.

vLLM's own front end wakes a task for each request at each step, builds an output object for it and
detokenizes. A worker needs only a step's ids and its end, so `emit` is called as soon as they are decoded.
Must not live here: parameters, prompts, the log, and imports of vLLM, whose client is passed in.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import anyio

from events.schema import Logprob
from rift.engines import Emit, RequestAborted, Step

# vLLM's other reasons, abort and error, do not end an answer.
FINISHES: dict[str, Literal["stop", "length"]] = {
    "stop": "stop",
    "repetition": "stop",
    "length": "length",
}
ERROR = "error"

# Reads the log probabilities of an `EngineCoreOutput`.
ReadLogprobs = Callable[[Any], tuple[Logprob, ...]]


class Stats(Protocol):
    """The part of `VllmStats` that is called here."""

    def begin(self, request: Any) -> None: ...

    def step(self, outputs: Any) -> None: ...

    def end(self, name: str, tokens: int, finish: str | None) -> None: ...

    def log(self, running_tokens: int) -> None: ...


class _RunningRequest:
    """One request in the engine. `over`: no more output is accepted. `ended`: the engine has finished it."""

    def __init__(self, emit: Emit, logprobs: ReadLogprobs | None) -> None:
        self.emit = emit
        self.logprobs = logprobs
        self.over = anyio.Event()
        self.ended = False
        self.finish: str | None = None
        self.tokens = 0
        self.error: Exception | None = None
        self._cached_tokens = 0

    def accept(self, output: Any) -> None:
        """Emit one `EngineCoreOutput`."""
        if output.prefill_stats is not None:
            self._cached_tokens = output.prefill_stats.num_cached_tokens
        continues = True
        finish = None if output.finish_reason is None else str(output.finish_reason)
        if finish == ERROR:
            self.error = RequestAborted("the engine could not continue this request")
        elif output.new_token_ids:
            cached_tokens = self._cached_tokens
            self._cached_tokens = 0
            self.tokens += len(output.new_token_ids)
            try:
                logprobs = self.logprobs(output) if self.logprobs is not None else ()
                ids = tuple(output.new_token_ids)
                continues = self.emit(Step(ids, FINISHES.get(finish or ""), cached_tokens, logprobs))
            except Exception as error:  # noqa: BLE001  # raised by `run` of this request; others continue
                self.error = error
                continues = False
        self.ended = finish is not None
        self.finish = finish
        if self.ended or not continues:
            self.stop()

    def stop(self, error: Exception | None = None) -> None:
        self.error = self.error or error
        self.over.set()


class VllmClient:
    """The requests that this process has in the engine.

    It stands in for the queue between vLLM's reader and front end, and calls each function in `after_step`
    once a step's output was accepted. `stats` notes what vLLM's metrics show.
    """

    def __init__(self, client: Any) -> None:
        assert client.resources.output_queue_task is None, "vLLM's reader keeps the queue that it began with"
        client.outputs_queue = self
        self.after_step: list[Callable[[], None]] = []
        self._client = client
        self._running: dict[str, _RunningRequest] = {}
        self._failure: Exception | None = None
        self.stats: Stats | None = None

    @property
    def running(self) -> int:
        return len(self._running)

    def put_nowait(self, outputs: Any) -> None:
        """Accept a step's `EngineCoreOutputs`, or the error with which vLLM's reader ends."""
        if isinstance(outputs, Exception):
            self._failure = self._client._format_exception(outputs)
            for running in self._running.values():
                running.stop(self._failure)
            return
        if self.stats is not None:
            self.stats.step(outputs)
            if not outputs.outputs:
                # Sent for its statistics only.
                return
        for output in outputs.outputs:
            one = self._running.get(output.request_id)
            if one is not None and not one.over.is_set():
                one.accept(output)
        for call in self.after_step:
            call()

    def log_stats(self) -> None:
        if self.stats is not None:
            self.stats.log(sum(running.tokens for running in self._running.values()))

    async def run(self, request: Any, emit: Emit, logprobs: ReadLogprobs | None = None) -> None:
        """Run an `EngineCoreRequest` to its end; abort it if `emit` returns False or the call is cancelled.

        Raises RequestAborted, any error of `emit`, and the client's error once the engine is dead.
        """
        if self._failure is not None:
            raise self._failure
        name = request.request_id
        assert name not in self._running, "an attempt runs once"
        running = self._running[name] = _RunningRequest(emit, logprobs)
        if self.stats is not None:
            self.stats.begin(request)
        try:
            await self._client.add_request_async(request)
            await running.over.wait()
        finally:
            del self._running[name]
            if self.stats is not None:
                self.stats.end(name, running.tokens, running.finish)
            if not running.ended:
                with anyio.CancelScope(shield=True):
                    await self._client.abort_requests_async([name])
        if running.error is not None:
            raise running.error
