"""The most that a request can cost, known before it is accepted: pure functions, in nano-USD."""

import msgspec
from msgspec.structs import replace

from events.contracts import OVERDUE_S
from events.schema import Message, Parameters, Price, RequestAccepted
from rift.catalogue import OUTPUT_TOKENS_DEFAULT
from rift.gateway.choices import Choices, by_prompt
from rift.gateway.dialects import dialect as dialects

# Tokens that a chat template adds to a prompt and to each message: a default system prompt, roles, markers.
# Without a template the tokenizer adds one or two. The worker refuses a prompt that is still longer.
TEMPLATE_TOKENS = 512
MESSAGE_TOKENS = 64
RAW_TOKENS = 16

# In the schemas tried, indented JSON with one value per line is at most four times as long as compact JSON.
INDENTED = 4


def prompt_tokens(accepted: RequestAccepted) -> int:
    """Return an upper bound of the prompt's tokens: a token is at least one byte."""
    is_raw = accepted.parameters.raw or not dialects.of(accepted.kind).has_template
    turns = 1 if isinstance(accepted.input, str) else len(accepted.input)
    around = RAW_TOKENS if is_raw else TEMPLATE_TOKENS + MESSAGE_TOKENS * turns
    return min(accepted.prompt_tokens_max, around + prompt_bytes(accepted))


def prompt_bytes(accepted: RequestAccepted) -> int:
    """Return the bytes of a body that become prompt: turns with their tool calls, and the tools."""
    if isinstance(accepted.input, str):
        return len(accepted.input.encode())
    size = sum(len(turn.content.encode()) for turn in accepted.input)
    if all(turn == Message(role=turn.role, content=turn.content) for turn in accepted.input):
        return size + _tool_bytes(accepted.parameters)
    return len(msgspec.json.encode(accepted.input)) + _tool_bytes(accepted.parameters)


def _tool_bytes(parameters: Parameters) -> int:
    """Return the bytes of the tools in a prompt: some templates indent their JSON."""
    return INDENTED * len(msgspec.json.encode(parameters.tools)) if parameters.tools else 0


def bounded(choices: Choices) -> Choices:
    """Return the acceptances with the most tokens that each one's prompt can have as `prompt_tokens_max`."""
    return tuple(
        replace(accepted, prompt_tokens_max=tokens)
        for prompt in by_prompt(choices)
        for tokens in [prompt_tokens(prompt[0])]
        for accepted in prompt
    )


def nanousd(choices: Choices, price: Price) -> int:
    """Return the highest cost of a body's requests, whose prompts are within `prompt_tokens_max`.

    Each prompt, and each second in which several of them run, is charged once.
    """
    first = choices[0]
    if first.plan == "per_second":
        seconds = -(-first.deadline_ms // 1000) + int(OVERDUE_S)
        return seconds * (price.second_nanousd or 0)
    prompt = max(price.prompt_nanousd, price.cached_prompt_nanousd or 0)
    output = first.parameters.max_tokens
    if output is None:
        output = OUTPUT_TOKENS_DEFAULT
    prompts = sum(group[0].prompt_tokens_max for group in by_prompt(choices))
    return prompts * prompt + len(choices) * output * price.output_nanousd
