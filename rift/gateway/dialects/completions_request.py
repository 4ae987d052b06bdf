"""Parse the body of `/v1/completions`, and the fields it shares with chat: pure functions.

FIELDS.md lists every field.
"""

from typing import Annotated, Any

import msgspec
from msgspec.structs import replace

from events.schema import Kind, Message, Parameters
from rift.gateway.asgi.errors import HTTPError
from rift.gateway.dialects.answer_format import ChatFormat, FormatBody, of_chat, with_structured_outputs
from rift.gateway.dialects.openai_fields import Alternatives
from rift.gateway.dialects.sampling import Body, ParsedRequest, Text, decode, note, parameters, wrong
from rift.gateway.dialects.support import check_support, refused

# Of all prompts together. An engine with 8 slots runs this many at once; more would wait for one another.
CHOICES_MAX = 8

Choices = Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MAX)]
# How many are too many depends on `n`.
Prompts = Annotated[list[Text], msgspec.Meta(min_length=1, extra_json_schema={"maxItems": CHOICES_MAX})]
BestOf = Annotated[int, msgspec.Meta(ge=0, le=CHOICES_MAX)]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: Annotated[bool | None, note("If true, the last chunk has the usage.")] = None
    continuous_usage_stats: Annotated[
        bool | None, note("With `include_usage`: if true, every chunk has the usage so far.")
    ] = None


class OpenAIBody(FormatBody, frozen=True, kw_only=True):
    """Fields that chat and completions have."""

    stream_options: Annotated[
        StreamOptions | None,
        note("`include_usage`, and `continuous_usage_stats` with it; `include_obfuscation` is ignored."),
    ] = None
    n: Annotated[
        Choices | None,
        note("Each choice is a separate request; choice k uses `seed` + k. The limit is for all prompts."),
    ] = None
    response_format: Annotated[
        ChatFormat | None, note("`schema` is an extension for the type json_object.")
    ] = None


class CompletionBody(OpenAIBody, frozen=True, kw_only=True):
    prompt: Annotated[Text | Prompts, note("A text, or a list of texts. Token ids are refused.")]
    logprobs: Annotated[Alternatives | None, note("The sampled token is always among the alternatives.")] = (
        None
    )
    best_of: Annotated[BestOf | None, note("Must equal `n`, or be 0.")] = None
    add_special_tokens: Annotated[Any, refused(True)] = None
    prompt_embeds: Annotated[Any, refused()] = None
    suffix: Annotated[Any, refused()] = None


def parse_completion(data: Body) -> ParsedRequest:
    """Raises HTTPError."""
    try:
        body = decode(data, _completion)
    except HTTPError as error:
        param = error.param or ""
        if not (param.startswith("prompt[") and error.message.endswith(("got `int`", "got `array`"))):
            raise
        raise wrong(param, "token ids are not supported; send text", code="unsupported") from error
    if body.best_of and body.best_of != (body.n or 1):
        raise wrong("best_of", "every choice is returned, so `best_of` must equal `n`; leave it out")
    first, *more = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    prompts, n = 1 + len(more), body.n or 1
    if prompts * n > CHOICES_MAX:
        words = f"{prompts} prompts with `n` {n} are {prompts * n} choices; the limit is {CHOICES_MAX}"
        raise wrong("prompt", f"{words}: send fewer prompts in one request")
    sampled = replace(sampling_of(body, body.max_tokens), logprobs=body.logprobs)
    return replace(parsed_request("completion", body, first, sampled), more=tuple(more))


_completion = msgspec.json.Decoder(CompletionBody)


def parsed_request(
    kind: Kind, body: OpenAIBody, prompt: str | tuple[Message, ...], sampled: Parameters
) -> ParsedRequest:
    options = body.stream_options or StreamOptions()
    return ParsedRequest(
        kind=kind,
        model=body.model,
        input=prompt,
        parameters=sampled,
        stream=bool(body.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
        choices=body.n or 1,
        metadata=body.metadata or {},
        store=body.store is not False,
    )


def sampling_of(body: OpenAIBody, max_tokens: int | None) -> Parameters:
    """Check the body's support, and return the sampling parameters that chat and completions have.

    Raises HTTPError.
    """
    check_support(body)
    return replace(
        parameters(body, max_tokens),
        logit_bias=body.logit_bias or {},
        response_format=with_structured_outputs(body, of_chat(body.response_format), "response_format"),
    )
