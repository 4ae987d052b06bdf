"""Runs requests in vLLM's engine process, with one reader for all of them.

vLLM's own front end wakes a task for each request at each step, builds an output object for it and
detokenizes. A worker needs only a step's ids and its end, so `emit` is called where the output is read.
Must not live here: parameters, prompts, the log, and imports of vLLM, whose client is passed in.
"""

from collections.abc import Callable
from typing import Any, Literal

import anyio

from events.schema import Logprob
from events.wakeup import Wakeup
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


class _RunningRequest:
    """One request in the engine. `over`: no more output is accepted. `ended`: the engine has finished it."""

    def __init__(self, emit: Emit, logprobs: ReadLogprobs | None) -> None:
        self.emit = emit
        self.logprobs = logprobs
        self.over = False
        self.ended = False
        self.error: Exception | None = None
        self.wake = Wakeup()
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
            try:
                logprobs = self.logprobs(output) if self.logprobs is not None else ()
                ids = tuple(output.new_token_ids)
                continues = self.emit(Step(ids, FINISHES.get(finish or ""), cached_tokens, logprobs))
            except Exception as error:  # noqa: BLE001  # raised by `run` of this request; others continue
                self.error = error
                continues = False
        self.ended = finish is not None
        if self.ended or not continues:
            self.stop()

    def stop(self, error: Exception | None = None) -> None:
        self.over = True
        self.error = self.error or error
        self.wake.set()


class VllmClient:
    """The requests that this process has in the engine. One of the waiting tasks reads for all of them."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._running: dict[str, _RunningRequest] = {}
        self._has_reader = False

    @property
    def running(self) -> int:
        return len(self._running)

    async def run(self, request: Any, emit: Emit, logprobs: ReadLogprobs | None = None) -> None:
        """Run an `EngineCoreRequest` to its end; abort it if `emit` returns False or the call is cancelled.

        Raises RequestAborted, any error of `emit`, and the client's error once the engine is dead.
        """
        name = request.request_id
        assert name not in self._running, "an attempt runs once"
        running = self._running[name] = _RunningRequest(emit, logprobs)
        try:
            await self._client.add_request_async(request)
            while not running.over:
                if self._has_reader:
                    await running.wake.wait()
                else:
                    await self._read_for(running)
        finally:
            del self._running[name]
            if not self._has_reader:
                self._wake_another()
            if not running.ended:
                with anyio.CancelScope(shield=True):
                    await self._client.abort_requests_async([name])
        if running.error is not None:
            raise running.error

    async def _read_for(self, reader: _RunningRequest) -> None:
        """Read for all requests until `reader` is over."""
        self._has_reader = True
        try:
            while not reader.over:
                for output in (await self._client.get_output_async()).outputs:
                    running = self._running.get(output.request_id)
                    if running is not None and not running.over:
                        running.accept(output)
        except Exception as error:
            for running in self._running.values():
                running.stop(error)
            raise
        finally:
            self._has_reader = False

    def _wake_another(self) -> None:
        """Let another task read. If it is cancelled first, it wakes the next one on its way out."""
        for running in self._running.values():
            if not running.over:
                running.wake.set()
                return
