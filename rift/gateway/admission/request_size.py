"""What a request counts as before an engine has seen it: pure functions. Gateways have no tokenizer.

For the fewest tokens of a prompt only text counts that every chat template writes, without the spaces around
it, which many templates drop. So a prompt that an engine would accept is never refused for its size here.
"""

from collections.abc import Iterable

import msgspec

from events.contracts import MESSAGE_BYTES_MAX
from events.schema import Message, Problem, RequestAccepted
from rift.catalogue import OUTPUT_TOKENS_DEFAULT, Model, context_overflow
from rift.gateway.admission import max_cost
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.choices import Choices, at_prompt, by_prompt
from rift.gateway.completion import Completion
from rift.gateway.dialects import dialect
from rift.gateway.dialects.sampling import ParsedRequest

# Templates leave out roles that they do not know, such as `developer`.
WRITTEN_ROLES = ("system", "user", "assistant", "tool")
# Templates of reasoning models leave out what an earlier answer has up to this mark.
REASONING_END = "</think>"

# About the bytes of a prompt in one token, in most languages and tokenizers.
TOKEN_BYTES = 4

# A request's records but its acceptance, and about what a token takes in them, alone and with each logprob.
# Answers are counted from their tokens, because only the reader of the lane sees their records.
ENDS_BYTES = 1024
TOKEN_LOG_BYTES = 171
LOGPROB_LOG_BYTES = 64

# A record around its event: the writer, the sealed event's own fields, and their names.
ENVELOPE_BYTES = 16 * 1024

PARAMS = {"inference": "prompt", "completion": "prompt", "chat": "messages", "response": "input"}


def check_fits(parsed: ParsedRequest, model: Model) -> None:
    """Raise HTTPError (400) if a prompt, or a prompt with `max_tokens`, cannot fit into the context."""
    for at, prompt in enumerate((parsed.input, *parsed.more)):
        if (problem := _overflow(parsed, prompt, model)) is not None:
            named = at_prompt(problem, at) if parsed.more else problem
            shown = dialect.of(parsed.kind).translate(named)
            raise HTTPError(400, shown.message, code=shown.code, param=shown.param)


def _overflow(parsed: ParsedRequest, prompt: str | tuple[Message, ...], model: Model) -> Problem | None:
    tokens = max(1, -(-prompt_bytes(prompt) // model.prompt_bytes_per_token_max))
    if not isinstance(prompt, str):
        # Templates write at least one token for each message.
        tokens = max(tokens, len(prompt))
    context = model.context_tokens
    limit = min(context - 1, parsed.prompt_tokens_max or context)
    output = parsed.parameters.max_tokens
    overflow = context_overflow(tokens, output, context=context, limit=limit, at_least=True)
    if overflow is None:
        return None
    param = PARAMS[parsed.kind] if tokens > limit else parsed.max_tokens_param
    return msgspec.structs.replace(overflow, param=param)


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


def check_record(accepted: RequestAccepted, *, sealed: bool) -> None:
    """Raise HTTPError (413) if the acceptance is larger than a record: its keys are stored before it is."""
    size = len(msgspec.json.encode(accepted))
    # Sealed content is base64.
    size = -(-4 * size // 3) if sealed else size
    if size > MESSAGE_BYTES_MAX - ENVELOPE_BYTES:
        message = (
            f"the request takes {size} bytes in the log, and the limit is {MESSAGE_BYTES_MAX}: send a "
            "shorter prompt"
        )
        raise HTTPError(413, message, code="body_too_large")


def tokens(choices: Choices) -> int:
    """Return about how many tokens are used: each prompt once, and the most output of each choice."""
    prompts = sum(-(-max_cost.prompt_bytes(prompt[0]) // TOKEN_BYTES) for prompt in by_prompt(choices))
    return prompts + sum(_output_max(accepted) for accepted in choices)


def _output_max(accepted: RequestAccepted) -> int:
    if (output := accepted.parameters.max_tokens) is not None:
        return output
    return min(OUTPUT_TOKENS_DEFAULT, accepted.prompt_tokens_max)


def stored_bytes(choices: Choices) -> int:
    """Return about the bytes of the acceptances: each has its prompt. Sealed, they are a third larger."""
    return sum(len(prompt) * len(msgspec.json.encode(prompt[0])) for prompt in by_prompt(choices))


def answer_bytes(answers: Iterable[Completion]) -> int:
    """Return about the bytes that were stored for ended requests after their acceptances."""
    size = 0
    for answer in answers:
        logprobs = answer.accepted.parameters.logprobs
        each = TOKEN_LOG_BYTES + (0 if logprobs is None else LOGPROB_LOG_BYTES * (1 + logprobs))
        size += ENDS_BYTES + each * answer.life.next_index
    return size
