"""A problem in the log has the names of the API that shows it."""

import pytest

from events.schema import Problem
from rift.gateway.dialects.dialect import CHAT, COMPLETIONS, NATIVE, RESPONSES, Dialect


@pytest.mark.parametrize(
    ("dialect", "param", "shown"),
    [
        (RESPONSES, "messages", "input"),
        (RESPONSES, "max_tokens", "max_output_tokens"),
        (RESPONSES, "response_format", "text.format"),
        (RESPONSES, "tools", "tools"),
        (CHAT, "messages", "messages"),
        (CHAT, "template", "chat_template_kwargs"),
        (RESPONSES, "template", "chat_template_kwargs"),
        (COMPLETIONS, "logprobs", "logprobs"),
        (NATIVE, "parameters.max_tokens", "parameters.max_tokens"),
        (CHAT, None, None),
    ],
)
def test_a_field_has_the_apis_name(dialect: Dialect, param: str | None, shown: str | None) -> None:
    problem = Problem(code="invalid_value", message="wrong", param=param)
    assert dialect.translate(problem) == Problem(code="invalid_value", message="wrong", param=shown)


@pytest.mark.parametrize("code", ["prompt_too_long", "max_tokens_too_large"])
def test_only_openais_apis_translate_the_code(code: str) -> None:
    problem = Problem(code=code, message="too long")
    assert NATIVE.translate(problem) == problem
    for dialect in (COMPLETIONS, CHAT, RESPONSES):
        shown = dialect.translate(problem)
        assert (shown.code, shown.message) == (
            "context_length_exceeded",
            "too long (context_length_exceeded)",
        )
