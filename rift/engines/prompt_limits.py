"""Limits on the size of a prompt: pure functions.

A tokenizer takes up to five seconds and 120 MB of memory for each megabyte of text, so a prompt that cannot
fit is refused by its bytes, before it is encoded.
"""

from collections.abc import Iterator

from events.schema import Message, Parameters
from rift.catalogue import Model
from rift.engines import EngineFailed, InvalidRequest, PromptTooLong


def check_bytes(size: int, param: str, *, tokens_max: int, token_bytes_max: int) -> None:
    """Raise PromptTooLong if so many bytes of text are more than `tokens_max` tokens in any case."""
    least = -(-size // token_bytes_max)
    if least > tokens_max:
        raise PromptTooLong(least, param, tokens_max=tokens_max)


def check_turns(prompt: str | tuple[Message, ...], *, tokens_max: int) -> None:
    """Raise PromptTooLong if there are more messages than tokens: templates write at least one for each."""
    if not isinstance(prompt, str) and len(prompt) > tokens_max:
        raise PromptTooLong(len(prompt), "messages", tokens_max=tokens_max)


def check_tokens(count: int, param: str, *, tokens_max: int) -> None:
    """Raise PromptTooLong if a prompt has more than `tokens_max` tokens."""
    if count > tokens_max:
        raise PromptTooLong(count, param, tokens_max=tokens_max, at_least=False)


def check_token_bytes(needed: int, name: str, model: Model) -> None:
    """Raise EngineFailed if the bound of the catalogue's model `name` is below its tokenizer's longest token.

    Gateways, which have no tokenizer, would then refuse prompts that fit.
    """
    configured = model.prompt_bytes_per_token_max
    if configured < needed:
        raise EngineFailed(
            f'models."{name}".prompt_bytes_per_token_max is {configured}, but the longest token of its '
            f"tokenizer has {needed} bytes: set it to {needed}, and restart the gateways too"
        )


def param_of(prompt: str | tuple[Message, ...]) -> str:
    return "prompt" if isinstance(prompt, str) else "messages"


def text_bytes(prompt: str | tuple[Message, ...], parameters: Parameters) -> int:
    """Return the bytes of all text that a chat template may write."""
    return sum(map(_size, texts(prompt, parameters)))


def texts(prompt: str | tuple[Message, ...], parameters: Parameters) -> Iterator[str]:
    """Yield all text that a chat template may write."""
    if isinstance(prompt, str):
        yield prompt
    else:
        for turn in prompt:
            yield turn.content
            yield turn.reasoning
            for call in turn.tool_calls:
                yield call.name
                yield call.arguments
    for tool in parameters.tools:
        yield tool.name
        yield tool.description or ""
        yield tool.parameters or ""
    yield parameters.template or ""


def check_text(prompt: str | tuple[Message, ...], parameters: Parameters) -> None:
    """Raise InvalidRequest if half a surrogate pair is in a text, because no tokenizer accepts that."""
    try:
        for text in texts(prompt, parameters):
            text.encode()
    except UnicodeEncodeError as error:
        param = param_of(prompt)
        raise InvalidRequest(
            f"{param} is not valid text: {error.reason}", code="invalid_text", param=param
        ) from error


def _size(text: str) -> int:
    # Half a surrogate pair is refused later, by name.
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
