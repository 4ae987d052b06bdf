"""An engine that generates the ids of a script, in steps of any size, with any decoder and parser.

For tests that need to know every token of an answer in advance.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from events.schema import Logprob, Message, Parameters
from rift.engines import Decoder, Emit, Parser, Rendered, RequestAborted, Step
from rift.engines.sim import SimDecoder


class ScriptedEngine:
    """Implements `rift.engines.Engine`. The answer ends with `finish`; None: the engine aborts it."""

    name = "sim"
    simulated = True
    model_digest = "scripted"
    slots = 64
    context_tokens = 100_000
    token_bytes_max = 4

    def __init__(
        self,
        script: Sequence[int],
        *,
        finish: Literal["stop", "length"] | None = "stop",
        decoder: Callable[[], Decoder] = SimDecoder,
        parser: Callable[[], Parser] | None = None,
        step_tokens: int = 1,
        grammar: bool = False,
    ) -> None:
        self.after_step: list[Callable[[], None]] = []
        self.script = list(script)
        self.finish = finish
        self.step_tokens = step_tokens
        self._decoder = decoder
        self._parser = parser
        self._grammar = grammar

    def log_metrics(self) -> None:
        pass

    async def render(
        self, prompt: str | tuple[Message, ...], parameters: Parameters, *, raw: bool, tokens_max: int
    ) -> Rendered:
        del prompt, raw, tokens_max
        return Rendered([1, 2, 3], parameters, grammar=self._grammar)

    def decoder(self) -> Decoder:
        return self._decoder()

    def parser(self, rendered: Rendered) -> Parser | None:
        del rendered
        return self._parser() if self._parser is not None else None

    async def generate(
        self,
        attempt: str,
        rendered: Rendered,
        output_ids: Sequence[int],
        *,
        max_tokens: int,
        salt: str,
        emit: Emit,
    ) -> None:
        del attempt, salt
        assert list(output_ids) == self.script[: len(output_ids)], "a continuation must follow the script"
        rest = self.script[len(output_ids) :][:max_tokens]
        for start in range(0, len(rest), self.step_tokens):
            ids = tuple(rest[start : start + self.step_tokens])
            is_last = start + len(ids) == len(rest)
            is_whole = len(output_ids) + len(rest) == len(self.script)
            finish = (self.finish if is_whole else "length") if is_last else None
            logprobs = tuple(Logprob(token=str(token_id), logprob=-0.5) for token_id in ids)
            if rendered.parameters.logprobs is None:
                logprobs = ()
            continues = emit(Step(ids, finish, logprobs=logprobs))
            for call in self.after_step:
                call()
            if not continues:
                return
        if self.finish is None:
            raise RequestAborted("the script has no end")

    async def close(self) -> None:
        return None
