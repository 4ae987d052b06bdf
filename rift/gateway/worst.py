"""The most that a request can cost, known before it is accepted: pure functions, in nano-USD."""

from events.schema import Price, RequestAccepted
from rift.catalogue import OUTPUT_TOKENS_DEFAULT

# Tokens that a chat template writes around a prompt, and around each message: a system prompt of its own,
# roles and markers. Without a template there are the tokenizer's own, one or two. The worker refuses a prompt
# that is longer all the same.
TEMPLATE_TOKENS = 512
MESSAGE_TOKENS = 64
RAW_TOKENS = 16

# A worker ends a request at its deadline; control ends it 5 s later, and then nothing is charged.
OVERDUE_S = 10


def prompt_tokens(accepted: RequestAccepted) -> int:
    """Return a bound of the prompt's tokens: a token is at least a byte."""
    texts = [accepted.input] if isinstance(accepted.input, str) else [m.content for m in accepted.input]
    is_raw = accepted.parameters.raw or accepted.kind == "completion"
    around = RAW_TOKENS if is_raw else TEMPLATE_TOKENS + MESSAGE_TOKENS * len(texts)
    return min(accepted.prompt_tokens_max, around + sum(len(text.encode()) for text in texts))


def nanousd(accepted: RequestAccepted, price: Price) -> int:
    """Return what the request costs at most, if its prompt has at most `prompt_tokens_max` tokens."""
    if accepted.plan == "per_second":
        seconds = -(-accepted.deadline_ms // 1000) + OVERDUE_S
        return seconds * (price.second_nanousd or 0)
    prompt = max(price.prompt_nanousd, price.cached_prompt_nanousd or 0)
    output = accepted.parameters.max_tokens or OUTPUT_TOKENS_DEFAULT
    return accepted.prompt_tokens_max * prompt + output * price.output_nanousd
