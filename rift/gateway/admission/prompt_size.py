"""The fewest tokens that a prompt can have, known without a tokenizer: pure functions.

Only text counts that every chat template writes, without the spaces around it, which many templates drop. So
a prompt that an engine would accept is never refused for its size here.
"""

from events.schema import Message
from rift.catalogue import Model
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.dialects.sampling import ParsedRequest

# Templates leave out roles that they do not know, such as `developer`.
WRITTEN_ROLES = ("system", "user", "assistant", "tool")
# Templates of reasoning models leave out what an earlier answer has up to this mark.
REASONING_END = "</think>"

PARAMS = {"inference": "prompt", "completion": "prompt", "chat": "messages", "response": "input"}


def check_fits(parsed: ParsedRequest, model: Model) -> None:
    """Raise HTTPError (400) if the prompt, or the prompt with `max_tokens`, cannot fit into the context."""
    written = prompt_bytes(parsed.input)
    tokens = max(1, -(-written // model.prompt_bytes_per_token_max))
    limit = min(model.context_tokens, parsed.prompt_tokens_max or model.context_tokens)
    if tokens > limit:
        param = PARAMS[parsed.kind]
        message = (
            f"{param} has {written} bytes, which are at least {tokens} tokens; the limit is {limit} tokens: "
            "send a shorter prompt"
        )
        raise HTTPError(400, message, code="prompt_too_long", param=param)
    output = parsed.parameters.max_tokens
    if output is not None and tokens + output > model.context_tokens:
        param = parsed.max_tokens_param
        message = (
            f"{param} is {output}; the context of {parsed.model} is {model.context_tokens} tokens, and the "
            f"prompt has at least {tokens} of them"
        )
        raise HTTPError(400, message, code="max_tokens_too_large", param=param)


def prompt_bytes(prompt: str | tuple[Message, ...]) -> int:
    """Return the bytes of text that any template writes into the prompt."""
    if isinstance(prompt, str):
        return _size(prompt.strip())
    return sum(_size(_written(turn)) for turn in prompt)


def _written(turn: Message) -> str:
    if turn.role not in WRITTEN_ROLES:
        return ""
    return turn.content.rpartition(REASONING_END)[2].strip()


def _size(text: str) -> int:
    # Half a surrogate pair is refused later, by name.
    return len(text.encode(errors="surrogatepass"))
