"""A prompt that cannot fit is refused before anything is stored, and one that might fit never is."""

from functools import partial
from typing import Any

import pytest

from events import subjects
from events.schema import Message, Parameters
from rift.catalogue import NATIVE_PROMPT_TOKENS_MAX, Model
from rift.gateway.admission import request_size
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.dialects.dialect import native_dialect
from rift.gateway.dialects.sampling import ParsedRequest
from tests.rift.gateway.admission.test_credit import World, live
from tests.rift.gateway.admission.test_rate_limits import whole
from tests.simulation import processes
from tests.simulation.processes import MODEL, MODELS

CONTEXT_LENGTH = "context_length_exceeded"
CONTEXT = MODELS[MODEL].context_tokens
FITS = CONTEXT * MODELS[MODEL].prompt_bytes_per_token_max
SMALL = Model(
    source="sim", context_tokens=10_000, prompt_usd="1", output_usd="1", prompt_bytes_per_token_max=2
)


def parsed(prompt: str | tuple[Message, ...], **more: Any) -> ParsedRequest:
    given = {"kind": "chat", "model": "m", "parameters": Parameters(), "stream": False}
    return ParsedRequest(input=prompt, **(given | more))


def bodies(text: str, tokens: int) -> dict[str, dict[str, Any]]:
    return {
        "/v1/inference": {"prompt": text, "parameters": {"max_tokens": tokens}, "store": False},
        "/v1/completions": {"prompt": text, "max_tokens": tokens, "store": False},
        "/v1/chat/completions": {
            "messages": [{"role": "system", "content": text[:9]}, {"role": "user", "content": text[9:]}],
            "max_tokens": tokens,
            "store": False,
        },
        "/v1/responses": {"input": text, "max_output_tokens": tokens, "store": False},
    }


@pytest.mark.parametrize(
    ("text", "tokens", "code"),
    [("x" * (FITS + 1), 1, "prompt_too_long"), ("x", CONTEXT, "max_tokens_too_large")],
)
def test_every_route_refuses_before_anything_is_stored(text: str, tokens: int, code: str) -> None:
    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        for path, body in bodies(text, tokens).items():
            call = world.ask(gateway, path, headers={"idempotency-key": path}, **body)
            assert await whole(call) == (400, code if path == "/v1/inference" else CONTEXT_LENGTH), path
        for stream in (subjects.KEYS, subjects.SECRETS):
            assert world.broker.stream(stream).last_sequence == 0
        stored = [each.subject for each in world.broker.stream("RIFT_0").messages]
        assert not [subject for subject in stored if ".request." in subject]

    live(test)


def test_a_prompt_of_the_longest_tokens_is_left_to_the_engine() -> None:
    # The answer needs one token of the context.
    request_size.check_fits(parsed("x" * 19_998), SMALL)
    with pytest.raises(HTTPError, match=r"at least 10001 tokens \(10000 in the prompt, 1 in ") as refused:
        request_size.check_fits(parsed("x" * 19_999), SMALL)
    assert (refused.value.code, refused.value.param) == (CONTEXT_LENGTH, "messages")
    # A byte is not a character.
    with pytest.raises(HTTPError):
        request_size.check_fits(parsed("é" * 10_000), SMALL)
    # Templates write at least one token for each message.
    turns = tuple(Message(role="user", content="") for _ in range(10_000))
    assert request_size.prompt_bytes(turns) == 0
    request_size.check_fits(parsed(turns[1:]), SMALL)
    with pytest.raises(HTTPError, match=r"\(10000 in the prompt"):
        request_size.check_fits(parsed(turns), SMALL)


def test_the_native_routes_own_limit_names_the_routes_that_accept_more() -> None:
    native_only = {"kind": "inference", "prompt_tokens_max": NATIVE_PROMPT_TOKENS_MAX}
    others = "limit of /v1/inference .*use /v1/chat/completions, .* context of 10000 tokens"
    with pytest.raises(HTTPError, match=f"at least 10000 tokens; 8192 tokens is the {others}") as refused:
        request_size.check_fits(parsed("x" * 20_000, **native_only), SMALL)
    assert (refused.value.code, refused.value.param) == ("prompt_too_long", "prompt")
    # Where the context is the limit, no route accepts more.
    with pytest.raises(HTTPError, match=r"Reduce the length of the prompt\.$") as refused:
        request_size.check_fits(parsed("x" * 20_001, kind="inference", prompt_tokens_max=10_000), SMALL)
    assert refused.value.code == "prompt_too_long"


@pytest.mark.parametrize(("limit", "expected"), [(CONTEXT, "max_tokens_too_large"), (20, "body_too_large")])
def test_the_setting_limits_the_native_route_only(
    limit: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = partial(processes.GatewayConfig, native_prompt_tokens_max=limit)
    monkeypatch.setattr(processes, "GatewayConfig", config)
    text = "x" * 21 * MODELS[MODEL].prompt_bytes_per_token_max

    async def test(world: World) -> None:
        gateway = await world.gateway(served=(MODEL,))
        codes = []
        for path, body in bodies(text, CONTEXT).items():
            _, code = await whole(world.ask(gateway, path, **body))
            codes.append(code)
        assert codes == [expected, *[CONTEXT_LENGTH] * 3]

    live(test)


@pytest.mark.parametrize(
    ("tokens", "size"), [(1024, 256 << 10), (8192, 2 << 20), (16_384, 4 << 20), (10**6, 8 << 20)]
)
def test_a_body_of_the_native_route_has_room_for_its_longest_prompt(tokens: int, size: int) -> None:
    dialect = native_dialect(tokens)
    assert dialect.body_bytes_max == size
    assert dialect.parse(b'{"model":"m","prompt":"x"}').prompt_tokens_max == tokens


def test_text_that_a_template_may_leave_out_does_not_count() -> None:
    padded = "  \n" * 40_000 + "x" * 9 + "\t" * 40_000
    thought = f"<think>{'x' * 40_000}</think>answer"
    turns = (
        Message(role="user", content=padded, reasoning="x" * 40_000, name="x" * 40_000),
        Message(role="developer", content="x" * 40_000),
        Message(role="assistant", content=thought),
    )
    assert request_size.prompt_bytes(turns) == 9 + len("answer")
    request_size.check_fits(parsed(turns), SMALL)


def test_max_tokens_and_the_fewest_tokens_of_the_prompt_must_fit_together() -> None:
    request_size.check_fits(parsed("x" * 200, parameters=Parameters(max_tokens=9_900)), SMALL)
    with pytest.raises(HTTPError, match=r"at least 10001 tokens \(100 in the prompt, 9901 in ") as refused:
        request_size.check_fits(parsed("x" * 200, parameters=Parameters(max_tokens=9_901)), SMALL)
    assert (refused.value.code, refused.value.param) == (CONTEXT_LENGTH, "max_tokens")
