"""The way to vLLM's engine process and back: one reader for all requests.

vLLM's own front wakes a task for each request at each step, builds an output object for it and
detokenizes. What a worker needs of a step is its ids and its end, so it is told where they are read.
No parameters, prompts or log in here; and nothing of vLLM's is imported, its client is handed in.
"""

from collections.abc import Callable
from typing import Any, Literal

import anyio

from events.schema import Logprob
from rift.engines import Emit, RequestAborted, Step

# vLLM's other reasons, abort and error, are no end of an answer.
FINISHES: dict[str, Literal["stop", "length"]] = {
    "stop": "stop",
    "repetition": "stop",
    "length": "length",
}
ERROR = "error"

# Reads the log probabilities of an `EngineCoreOutput`.
Logprobs = Callable[[Any], tuple[Logprob, ...]]


class _Running:
    """One request in the engine. `over` says that nothing more is taken, `ended` that the engine knows."""

    def __init__(self, emit: Emit, logprobs: Logprobs | None) -> None:
        self.emit = emit
        self.logprobs = logprobs
        self.over = self.ended = False
        self.error: Exception | None = None
        self.wake = anyio.Event()
        self._cached_tokens = 0

    def take(self, output: Any) -> None:
        """Hand on one `EngineCoreOutput`."""
        if output.prefill_stats is not None:
            self._cached_tokens = output.prefill_stats.num_cached_tokens
        wanted = True
        finish = None if output.finish_reason is None else str(output.finish_reason)
        if finish == ERROR:
            self.error = RequestAborted("the engine could not go on with this request")
        elif output.new_token_ids:
            cached_tokens = self._cached_tokens
            self._cached_tokens = 0
            try:
                logprobs = self.logprobs(output) if self.logprobs is not None else ()
                ids = tuple(output.new_token_ids)
                wanted = self.emit(Step(ids, FINISHES.get(finish or ""), cached_tokens, logprobs))
            except Exception as error:  # noqa: BLE001  # raised where the request was started; others go on
                self.error = error
                wanted = False
        self.ended = finish is not None
        if self.ended or not wanted:
            self.stop()

    def stop(self, error: Exception | None = None) -> None:
        self.over = True
        self.error = self.error or error
        self.wake.set()


class VllmClient:
    """The requests that this process has in the engine. One of those who wait for an answer reads for all."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._running: dict[str, _Running] = {}
        self._is_read = False

    @property
    def running(self) -> int:
        return len(self._running)

    async def run(self, request: Any, emit: Emit, logprobs: Logprobs | None = None) -> None:
        """Run an `EngineCoreRequest` to its end. It is aborted if `emit` returns False or we are cancelled.

        Raises RequestAborted, what `emit` raises, and what the client raises once it is dead.
        """
        name = request.request_id
        assert name not in self._running, "an attempt runs once"
        running = self._running[name] = _Running(emit, logprobs)
        try:
            await self._client.add_request_async(request)
            while not running.over:
                if self._is_read:
                    await running.wake.wait()
                    running.wake = anyio.Event()
                else:
                    await self._read_for(running)
        finally:
            del self._running[name]
            if not self._is_read:
                self._wake_another()
            if not running.ended:
                with anyio.CancelScope(shield=True):
                    await self._client.abort_requests_async([name])
        if running.error is not None:
            raise running.error

    async def _read_for(self, reader: _Running) -> None:
        """Read for everybody until this one is over."""
        self._is_read = True
        try:
            while not reader.over:
                for output in (await self._client.get_output_async()).outputs:
                    running = self._running.get(output.request_id)
                    if running is not None and not running.over:
                        running.take(output)
        except Exception as error:
            for running in self._running.values():
                running.stop(error)
            raise
        finally:
            self._is_read = False

    def _wake_another(self) -> None:
        """Let one of the others read on. One that is cancelled meanwhile passes it on as it leaves."""
        for running in self._running.values():
            if not running.over:
                running.wake.set()
                return
