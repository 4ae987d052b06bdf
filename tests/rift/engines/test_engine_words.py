"""Error messages of the engine reach clients without its source, settings and flags."""

import logging

import pytest

from rift.engines.engine_words import (
    INTERNAL,
    QUOTING,
    SCHEMA,
    engine_words,
    silence_quotes,
    without_message,
)

COMPILER = "Failed to transform json schema into a grammar: [18:14:55] /project/cpp/"
TAG = "Invalid structural tag specification."


@pytest.mark.parametrize(
    ("message", "cause", "words"),
    [
        ("temperature must be in [0, 2], got 9.0.", None, "temperature must be in [0, 2], got 9.0."),
        (
            f'{COMPILER}json_schema_converter.cc:4944: Unsupported type "nonsense"\n',
            None,
            'the engine cannot enforce this schema: Unsupported type "nonsense"',
        ),
        (
            f"{COMPILER}grammar_parser.cc:820: EBNF parser error at line 1, column 6: Too large\n",
            None,
            "the engine cannot enforce this schema: Too large",
        ),
        (
            f"{COMPILER}converter.cc:936: Check failed: (val <= MAX_INT64) is false: Integer is too large\n",
            None,
            "the engine cannot enforce this schema: Integer is too large",
        ),
        (
            TAG,
            "[18:14:58] /project/cpp/regex_converter.cc:83: Regex error at position 3: Unclosed '['\n",
            "the engine cannot enforce this schema: Regex error at position 3: Unclosed '['",
        ),
        (TAG, None, SCHEMA),
        (f"{COMPILER}functor.cc:3567: Check failed: (hashes[id].has_value()) is false: \n", None, SCHEMA),
        (f"{COMPILER}functor.cc:3567: see /project/cpp/other.h:1\n", None, SCHEMA),
        ("The provided JSON schema contains features not supported by xgrammar.", None, SCHEMA),
        ("requires --enable-auto-tool-choice and --tool-call-parser to be set", None, SCHEMA),
        ("set VLLM_ALLOW_LONG_MAX_MODEL_LEN=1", None, SCHEMA),
        ("safe_apply_chat_template() got multiple values for argument", None, SCHEMA),
        ("pool.<locals>.TokenizerPool.apply_chat_template failed", None, SCHEMA),
        ("a ValueError was raised", None, SCHEMA),
    ],
)
def test_a_client_reads_the_reason_and_nothing_of_the_engine(
    message: str, cause: str | None, words: str
) -> None:
    shown = engine_words(message, "response_format", cause=cause, is_for_clients=True)
    assert shown == words
    assert not INTERNAL.search(shown)


def test_a_message_that_is_not_for_clients_is_withheld() -> None:
    shown = engine_words("'int' object is not iterable", "template", cause=None, is_for_clients=False)
    assert shown == "the model's chat template cannot be rendered with these variables"
    shown = engine_words("'int' object is not iterable", "seed", cause=None, is_for_clients=False)
    assert shown == "the engine rejects seed"


def test_what_may_quote_a_request_stays_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    engine_words("VLLM_X: my prompt", None, cause=None, is_for_clients=True)
    try:
        raise ValueError("my answer")
    except ValueError as error:
        logging.getLogger("x").error("a parser failed", exc_info=without_message(error))
    assert "my " not in caplog.text.replace('raise ValueError("my answer")', "")
    assert "Withheld: ValueError" in caplog.text


def test_vllms_loggers_that_quote_requests_are_silent() -> None:
    levels = {name: logging.getLogger(name).level for name in QUOTING}
    # An engine that an earlier test started in this process has silenced them.
    for name in QUOTING:
        logging.getLogger(name).setLevel(logging.NOTSET)
    parser = logging.getLogger("vllm.tool_parsers.some_parser")
    assert parser.isEnabledFor(logging.ERROR)
    silence_quotes()
    assert not parser.isEnabledFor(logging.CRITICAL)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
