"""Problems as OpenAI's APIs name them. The log has one name for each, whatever the API of the request."""

from collections.abc import Mapping

from msgspec.structs import replace

from events.schema import Problem

# Clients of OpenAI's APIs shorten a conversation when they read this code. Some look for it in the message.
CONTEXT_LENGTH = "context_length_exceeded"
CONTEXT_CODES = ("prompt_too_long", "max_tokens_too_large")


def translate(problem: Problem, params: Mapping[str, str]) -> Problem:
    """Return the problem with OpenAI's code. `params` has the API's names of fields, where they differ."""
    if problem.param is not None and problem.param in params:
        problem = replace(problem, param=params[problem.param])
    if problem.code not in CONTEXT_CODES:
        return problem
    return replace(problem, code=CONTEXT_LENGTH, message=f"{problem.message} ({CONTEXT_LENGTH})")
