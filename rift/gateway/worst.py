"""The most that a request can cost, known before it is accepted: pure functions, in nano-USD."""

from events.schema import Price, RequestAccepted
from rift.catalogue import OUTPUT_TOKENS_DEFAULT

# What a chat template may write around a prompt, and around each message, beyond what the client sent: a
# system prompt of its own, roles and markers. The worker refuses a prompt that is longer all the same.
TEMPLATE_BYTES = 1024
MESSAGE_BYTES = 64

# A worker ends a request at its deadline; control ends it 5 s later, and then nothing is charged.
OVERDUE_S = 10


def prompt_tokens(accepted: RequestAccepted) -> int:
    """Return a bound of the prompt's tokens: a token is at least a byte."""
    texts = [accepted.input] if isinstance(accepted.input, str) else [m.content for m in accepted.input]
    size = TEMPLATE_BYTES + sum(len(text.encode()) + MESSAGE_BYTES for text in texts)
    return min(accepted.prompt_tokens_max, size)


def nanousd(accepted: RequestAccepted, price: Price) -> int:
    """Return what the request costs at most, if its prompt has at most `prompt_tokens_max` tokens."""
    if accepted.plan == "per_second":
        seconds = -(-accepted.deadline_ms // 1000) + OVERDUE_S
        return seconds * (price.second_nanousd or 0)
    prompt = max(price.prompt_nanousd, price.cached_prompt_nanousd or 0)
    output = accepted.parameters.max_tokens or OUTPUT_TOKENS_DEFAULT
    return accepted.prompt_tokens_max * prompt + output * price.output_nanousd
