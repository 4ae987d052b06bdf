"""An engine with a GPU's timing and no processor time: a vLLM executor that sleeps instead of computing.

The scheduler, KV blocks, stop rules and output path are vLLM's. The engine process of either server loads
this class by its name, and reads the name of the hardware profile from `PROFILE_VARIABLE`.
"""

import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import ModelRunnerOutput

from replay.scaling import hardware
from tests.bench.paced import PROFILE_VARIABLE, words


class PacedExecutor(UniProcExecutor):
    """Executes steps that take as long as those of a hardware profile.

    A step takes `step_us_at(decoding requests)`, if there are any, plus the time of the prompt tokens that it
    reads. A token depends only on its position in the request, so answers are the same on every server.
    """

    def _init_executor(self) -> None:
        super()._init_executor()
        self._hardware = hardware.profile(os.environ[PROFILE_VARIABLE])
        tokenizer = Tokenizer.from_file(str(Path(self.model_config.tokenizer) / "tokenizer.json"))
        self._words = words(tokenizer.get_vocab())
        self._prompt_tokens: dict[str, int] = {}

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        for request in scheduler_output.finished_req_ids:
            self._prompt_tokens.pop(request, None)
        output, step_s = self._step(scheduler_output)
        time.sleep(step_s)
        if not non_block:
            return output
        future: Future[ModelRunnerOutput] = Future()
        future.set_result(output)
        return future

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return False

    def _step(self, scheduled: Any) -> tuple[ModelRunnerOutput, float]:
        """Return the step's tokens, and how long the step takes in seconds."""
        for new in scheduled.scheduled_new_reqs:
            self._prompt_tokens[new.req_id] = new.prompt_len
        cached = scheduled.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        answered = dict(zip(cached.req_ids, cached.num_output_tokens, strict=True))
        requests = list(scheduled.num_scheduled_tokens)
        sampled: list[list[int]] = []
        decoding = prefilled = 0
        for request, tokens in scheduled.num_scheduled_tokens.items():
            position = computed[request] + tokens
            is_read = position >= self._prompt_tokens[request] + answered.get(request, 0)
            sampled.append([self._words[position % len(self._words)]] if is_read else [])
            if tokens == 1 and computed[request] >= self._prompt_tokens[request]:
                decoding += 1
            else:
                prefilled += tokens
        step_us = self._hardware.step_us_at(decoding) if decoding else 0
        step_s = step_us / 1e6 + prefilled / self._hardware.prefill_tokens_per_s
        index = {request: number for number, request in enumerate(requests)}
        return ModelRunnerOutput(req_ids=requests, req_id_to_index=index, sampled_token_ids=sampled), step_s
