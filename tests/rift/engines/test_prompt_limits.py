"""Prompts that cannot fit are refused by their size, before a tokenizer reads them."""

import msgspec
import pytest

from events.schema import Message, Parameters, Tool, ToolCall
from rift.catalogue import Model, Profile
from rift.engines import EngineFailed, PromptTooLong
from rift.engines.prompt_limits import check_bytes, check_turns, text_bytes
from rift.engines.sim import PROMPT_BYTES_PER_TOKEN, SimEngine
from rift.engines.start import start_engine

MODEL = Model(source="sim", context_tokens=4096, prompt_usd="0.01", output_usd="0.02")


@pytest.mark.parametrize(
    ("size", "fits"), [(0, True), (1, True), (800, True), (801, False), (8 << 20, False)]
)
def test_a_text_fits_if_the_longest_tokens_could_hold_it(size: int, fits: bool) -> None:
    if fits:
        check_bytes(size, "prompt", tokens_max=100, token_bytes_max=8)
        return
    with pytest.raises(
        PromptTooLong, match=f"the prompt has at least {-(-size // 8)} tokens; the limit is 100"
    ) as refused:
        check_bytes(size, "prompt", tokens_max=100, token_bytes_max=8)
    assert (refused.value.code, refused.value.param) == ("prompt_too_long", "prompt")


def test_more_messages_than_tokens_do_not_fit() -> None:
    turns = (Message(role="user", content=""),) * 11
    check_turns(turns[1:], tokens_max=10)
    check_turns("x" * 11, tokens_max=10)
    with pytest.raises(PromptTooLong, match="the prompt has at least 11 tokens; the limit is 10") as refused:
        check_turns(turns, tokens_max=10)
    assert (refused.value.code, refused.value.param) == ("prompt_too_long", "messages")


def test_every_text_that_a_template_may_write_counts() -> None:
    assert text_bytes("水", Parameters()) == 3
    assert text_bytes("\ud800", Parameters()) == 3
    turns = (
        Message(role="user", content="1234"),
        Message(role="assistant", reasoning="12", tool_calls=(ToolCall(id="id", name="f", arguments="{}"),)),
    )
    tools = (Tool(name="f", description="1234", parameters="{}"),)
    assert text_bytes(turns, Parameters(tools=tools, template='{"a":1}')) == 4 + 2 + 3 + 7 + 7


@pytest.mark.anyio
async def test_the_simulated_engine_refuses_before_it_encodes() -> None:
    engine = SimEngine(MODEL)
    rendered = await engine.render("x" * 400, Parameters(), raw=False, tokens_max=100)
    assert len(rendered.prompt_ids) == 100
    for prompt, param in (("x" * 401, "prompt"), ((Message(role="user", content="x" * 401),), "messages")):
        with pytest.raises(PromptTooLong, match="the prompt has 101 tokens; the limit is 100") as refused:
            await engine.render(prompt, Parameters(), raw=False, tokens_max=100)
        assert (refused.value.code, refused.value.param) == ("prompt_too_long", param)


@pytest.mark.anyio
async def test_a_catalogue_that_promises_shorter_tokens_stops_the_start() -> None:
    exact = msgspec.structs.replace(MODEL, prompt_bytes_per_token_max=PROMPT_BYTES_PER_TOKEN)
    assert (await start_engine("sim", "model-a", exact, Profile())).token_bytes_max == PROMPT_BYTES_PER_TOKEN
    less = msgspec.structs.replace(MODEL, prompt_bytes_per_token_max=PROMPT_BYTES_PER_TOKEN - 1)
    with pytest.raises(EngineFailed) as refused:
        await start_engine("sim", "model-a", less, Profile())
    assert 'models."model-a".prompt_bytes_per_token_max is 3' in str(refused.value)
    assert "has 4 bytes: set it to 4" in str(refused.value)
