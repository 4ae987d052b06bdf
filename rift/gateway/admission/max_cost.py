"""The most that a request can cost, known before it is accepted: pure functions, in nano-USD."""

import msgspec

from events.schema import Message, Parameters, Price, RequestAccepted
from rift.catalogue import OUTPUT_TOKENS_DEFAULT
from rift.gateway.dialects import dialect as dialects

# Tokens that a chat template writes around a prompt, and around each message: a system prompt of its own,
# roles and markers. Without a template there are the tokenizer's own, one or two. The worker refuses a prompt
# that is longer all the same.
TEMPLATE_TOKENS = 512
MESSAGE_TOKENS = 64
RAW_TOKENS = 16

# Indented JSON, a line for each value, is at most so many times as long in the schemas tried.
INDENTED = 4

# A worker ends a request at its deadline; control ends it 5 s later, and then nothing is charged.
OVERDUE_S = 10


def prompt_tokens(accepted: RequestAccepted) -> int:
    """Return a bound of the prompt's tokens: a token is at least a byte."""
    is_raw = accepted.parameters.raw or not dialects.of(accepted.kind).has_template
    turns = 1 if isinstance(accepted.input, str) else len(accepted.input)
    around = RAW_TOKENS if is_raw else TEMPLATE_TOKENS + MESSAGE_TOKENS * turns
    return min(accepted.prompt_tokens_max, around + prompt_bytes(accepted))


def prompt_bytes(accepted: RequestAccepted) -> int:
    """Return how many bytes of the client's become prompt: turns, the calls in them, and the tools."""
    if isinstance(accepted.input, str):
        return len(accepted.input.encode())
    said = sum(len(turn.content.encode()) for turn in accepted.input)
    if all(turn == Message(role=turn.role, content=turn.content) for turn in accepted.input):
        return said + _tool_bytes(accepted.parameters)
    return len(msgspec.json.encode(accepted.input)) + _tool_bytes(accepted.parameters)


def _tool_bytes(parameters: Parameters) -> int:
    """A template writes tools as JSON, some of them indented: bytes that the client did not send."""
    return INDENTED * len(msgspec.json.encode(parameters.tools)) if parameters.tools else 0


def nanousd(accepted: RequestAccepted, price: Price, *, choices: int = 1) -> int:
    """Return what a request, or a group of `choices`, costs at most, if its prompt has at most
    `prompt_tokens_max` tokens. A group's prompt is charged once; a second in which it runs is one."""
    if accepted.plan == "per_second":
        seconds = -(-accepted.deadline_ms // 1000) + OVERDUE_S
        return seconds * (price.second_nanousd or 0)
    prompt = max(price.prompt_nanousd, price.cached_prompt_nanousd or 0)
    output = accepted.parameters.max_tokens or OUTPUT_TOKENS_DEFAULT
    return accepted.prompt_tokens_max * prompt + choices * output * price.output_nanousd
