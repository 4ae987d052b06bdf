"""An engine that says what it is told: the ids of a script, in steps of any size, decoded and parsed by any.

For tests in which every token of an answer has to be known beforehand.
"""

from collections.abc import Callable, Sequence
from typing import Literal

from events.schema import Logprob, Message, Parameters
from rift.engines import Decoder, Emit, Parser, Rendered, RequestAborted, Step
from rift.engines.sim import SimDecoder


class ScriptedEngine:
    """Implements `rift.engines.Engine`. After the script comes `finish`; None: the engine gives up."""

    name = "sim"
    simulated = True
    model_digest = "scripted"
    slots = 64
    context_tokens = 100_000

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
        self.script, self.finish, self.step_tokens = list(script), finish, step_tokens
        self._decoder, self._parser, self._grammar = decoder, parser, grammar

    async def render(
        self, prompt: str | tuple[Message, ...], parameters: Parameters, *, raw: bool
    ) -> Rendered:
        del prompt, raw
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
        assert list(output_ids) == self.script[: len(output_ids)], "a continuation goes on in the script"
        rest = self.script[len(output_ids) :][:max_tokens]
        for at in range(0, len(rest), self.step_tokens):
            ids = tuple(rest[at : at + self.step_tokens])
            is_last = at + len(ids) == len(rest)
            is_whole = len(output_ids) + len(rest) == len(self.script)
            finish = (self.finish if is_whole else "length") if is_last else None
            logprobs = tuple(Logprob(token=str(token_id), logprob=-0.5) for token_id in ids)
            shown = logprobs if rendered.parameters.logprobs is not None else ()
            if not emit(Step(ids, finish, logprobs=shown)):
                return
        if self.finish is None:
            raise RequestAborted("the script has no end")

    async def close(self) -> None:
        return None
