"""Engine errors as messages for clients: without source files, settings, flags and class names.

Must not live here: the decision whose fault an error is, and which parameter caused it.
"""

import logging
import re
from types import TracebackType

logger = logging.getLogger(__name__)

# The loggers of vLLM that quote prompts, answers or parameters.
QUOTING = (
    "vllm.logging_utils.dump_input",
    "vllm.reasoning",
    "vllm.renderers",
    "vllm.tool_parsers",
    "vllm.v1.structured_output",
)

INTERNAL = re.compile(
    r"\.(?:cc|cpp|h|pxi|py|rs)\b|VLLM_|(?:^|\s)--\w|\w\(\)|\w\.\w+\.\w|<\w+>|\b[A-Z]\w*(?:Error|Exception)\b"
    r"|xgrammar|\bvllm\b|jinja|EBNF|structural tag|0x[0-9a-f]{6}|\n",
    re.IGNORECASE,
)
# The grammar compiler puts its reason after a position in its source, and perhaps after a failed condition.
REASON = re.compile(
    r"\.(?:cc|cpp|h):\d+: (?:Check failed: \(.*?\) is (?:true|false): )?"
    r"(?:EBNF parser error at line \d+, column \d+: )?(?P<reason>\S[^\n]*)"
)
REFUSED = "the engine cannot serve this request"
UNSUPPORTED = {
    "tools": "this model cannot call tools: leave `tools` out, or set `tool_choice` to none",
    "template": "a request cannot set the chat template: leave it out",
}
SCHEMA = (
    "the engine cannot enforce this schema: remove keywords such as `multipleOf`, `uniqueItems`, `contains` "
    "or `format`, and length limits beside a pattern"
)
GENERIC = {
    "response_format": SCHEMA,
    "tools": SCHEMA,
    "template": "the model's chat template cannot be rendered with these variables",
    "messages": "the model's chat template cannot be rendered with these messages",
}


class Withheld(Exception):
    """In place of an error in the log; the message is only the error's type."""


def without_message(error: Exception) -> tuple[type[Withheld], Withheld, TracebackType | None]:
    """Return an error for `exc_info` without its message, which may quote a prompt or an answer."""
    return Withheld, Withheld(type(error).__name__), error.__traceback__


def silence_quotes() -> None:
    """Keep vLLM in this process from logging a request's content."""
    for name in QUOTING:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def engine_words(message: str, param: str | None, *, cause: object, is_for_clients: bool) -> str:
    """Return a client's version of an error message. Log a message that is withheld."""
    if found := REASON.search(f"{message}\n{cause}"):
        reason = found["reason"].strip().rstrip(".")
        if not INTERNAL.search(reason):
            return f"the engine cannot enforce this schema: {reason}"
    elif is_for_clients and not INTERNAL.search(message):
        return message
    # It may quote the request.
    logger.debug("an error is withheld from the client: %s", message)
    return GENERIC.get(param or "", f"the engine rejects {param or 'this request'}")
