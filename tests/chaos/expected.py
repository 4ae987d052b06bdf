"""The simulated engine's answer without a service: its text is a function of prompt and seed alone."""

from events.schema import Parameters
from rift import catalogue
from rift.engines import Step
from rift.engines.sim import PROMPT_BYTES_PER_TOKEN, SimEngine
from tests.chaos.checks import Expected

MODEL = "smollm2:135m"


async def answer(prompt: str, *, seed: int, max_tokens: int) -> Expected:
    now_s = 0.0

    async def jump(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds + max_tokens

    engine = SimEngine(catalogue.shipped()[MODEL], sleep=jump, now=lambda: now_s)
    decoder = engine.decoder()
    pieces: list[str] = []

    def emit(step: Step) -> bool:
        pieces.extend(decoder.feed(token_id) for token_id in step.token_ids)
        return True

    parameters = Parameters(max_tokens=max_tokens, seed=seed)
    rendered = await engine.render(prompt, parameters, raw=False, tokens_max=100_000)
    await engine.generate("", rendered, (), max_tokens=max_tokens, salt="", emit=emit)
    pieces[-1] += decoder.flush()
    assert len(pieces) == max_tokens, "the simulated engine runs to max_tokens"
    return Expected(pieces, -(-len(prompt.encode()) // PROMPT_BYTES_PER_TOKEN))
