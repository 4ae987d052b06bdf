"""An answer that is cut at any token and continued by another attempt is the uninterrupted one."""

from typing import Any

import pytest

from events.history import Counted, Past
from events.lifecycle import NEW
from events.schema import AttemptStarted, Parameters, RequestAccepted, RequestFinished, TokensGenerated
from rift.catalogue import Model
from rift.engines import Invalid
from rift.engines.sim import SimEngine
from rift.worker.attempt import Attempt, NotContinuable, Prompt, prepare
from rift.worker.text import Text

pytestmark = pytest.mark.anyio

MODEL = Model(source="sim", context_tokens=4096, prompt_usd="0.01", output_usd="0.02")
TOKENS = 80


class Written:
    """The lane's writer, as a list."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def put(self, *events: Any) -> None:
        self.events += events

    async def put_durably(self, event: Any) -> int:
        raise AssertionError("an attempt only puts")


def accepted(prompt: str = "tell me", **parameters: Any) -> RequestAccepted:
    return RequestAccepted(
        request="r",
        account="dev",
        key="k",
        model="m",
        kind="inference",
        input=prompt,
        parameters=Parameters(**{"max_tokens": TOKENS, **parameters}),
        stream=True,
        prompt_tokens_max=8192,
        deadline_ms=60_000,
        price_version=1,
    )


async def run(asked: RequestAccepted, past: Past | None = None) -> list[Any]:
    engine = SimEngine(MODEL, tokens_per_s=1e6)
    index = sum(len(counted.event.token_ids) for counted in past.counted) if past else 0
    started = AttemptStarted(
        request="r",
        attempt="a",
        after=None,
        resume_index=index,
        worker="w",
        prompt_tokens=1,
        accepted_at_ns=0,
        engine="sim",
        model_digest="",
        delivery="",
    )
    written = Written()
    prompt = await prepare(engine, asked)
    attempt = Attempt(asked, started, Prompt(prompt.rendered, TOKENS), engine=engine, writer=written)
    if past is not None:
        attempt.resume(past)
    await attempt.run(30)
    return written.events


def one_by_one(events: list[Any]) -> list[TokensGenerated]:
    return [event for event in events if isinstance(event, TokensGenerated)]


def ids_of(events: list[Any]) -> list[int]:
    return [token_id for event in one_by_one(events) for token_id in event.token_ids]


async def log_of(asked: RequestAccepted) -> tuple[list[Any], list[TokensGenerated]]:
    """Return an uninterrupted answer, and the same told token by token as a slow engine would."""
    events = await run(asked)
    engine = SimEngine(MODEL)
    text, told = Text(engine.decoder(), asked.parameters.stop), []
    for index, token_id in enumerate(ids_of(events)):
        _, piece = text.feed([token_id])
        told.append(TokensGenerated(attempt="a", index=index, token_ids=(token_id,), text=piece))
    return events, told


@pytest.mark.parametrize("prompt", ["tell me", "水は流れる", "more of it 🙂"])
@pytest.mark.parametrize("stop", [(), ("🌊",), (" the", "。水"), ("never in it",)])
async def test_cut_at_every_token(prompt: str, stop: tuple[str, ...]) -> None:
    asked = accepted(prompt, stop=stop, seed=3)
    whole, told = await log_of(asked)
    text = "".join(event.text for event in one_by_one(whole))
    for cut in range(1, len(told)):
        past = Past(counted=[Counted(event, NEW, 0) for event in told[:cut]])
        rest = await run(asked, past)
        logged = "".join(event.text for event in told[:cut])
        assert logged + "".join(event.text for event in one_by_one(rest)) == text, f"cut at {cut}"
        assert ids_of(rest) == ids_of(whole)[cut:]
        assert (rest[-1].reason, rest[-1].output_tokens) == (whole[-1].reason, whole[-1].output_tokens)


async def test_an_answer_that_was_whole_is_ended_without_the_engine() -> None:
    asked = accepted(seed=3)
    _, told = await log_of(asked)
    (end,) = await run(asked, Past(counted=[Counted(event, NEW, 0) for event in told]))
    assert isinstance(end, RequestFinished)
    assert (end.reason, end.output_tokens) == ("length", TOKENS)


async def test_another_text_than_was_logged_is_not_continued() -> None:
    event = TokensGenerated(attempt="a", index=0, token_ids=(300,), text="something else")
    with pytest.raises(NotContinuable):
        await run(accepted(), Past(counted=[Counted(event, NEW, 0)]))


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
async def test_penalties_over_output_tokens_are_not_continued(penalty: str) -> None:
    _, told = await log_of(accepted())
    with pytest.raises(NotContinuable):
        await run(accepted(**{penalty: 0.5}), Past(counted=[Counted(told[0], NEW, 0)]))


@pytest.mark.parametrize(("prompt", "parameters"), [("x" * 4 * 4096, {}), ("x" * 4000, {"max_tokens": 4000})])
async def test_what_does_not_fit_is_invalid(prompt: str, parameters: dict[str, int]) -> None:
    with pytest.raises(Invalid):
        await prepare(SimEngine(MODEL), accepted(prompt, **parameters))
