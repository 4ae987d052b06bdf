"""Parse the body of `/v1/completions`, and the fields it shares with chat: pure functions.

Unknown fields are ignored, as clients expect. Known fields that would change the answer but are not supported
are rejected. The gateway's README lists every field.
"""

from typing import Annotated, ClassVar

import msgspec
from msgspec.structs import replace

from events.schema import Kind, Message, Parameters
from rift.gateway.dialects.openai_fields import Alternatives, Biases, Metadata, Refused, refuse_unserved
from rift.gateway.dialects.sampling import Body, ParsedRequest, Sampling, Text, decode, parameters, wrong

# Of all prompts together. An engine with 8 slots runs this many at once; more would wait for one another.
CHOICES_MAX = 8

Choices = Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MAX)]
# How many are too many depends on `n`.
Prompts = Annotated[list[Text], msgspec.Meta(min_length=1, extra_json_schema={"maxItems": CHOICES_MAX})]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class OpenAIBody(Sampling, frozen=True, kw_only=True):
    """Fields that both APIs have."""

    unserved: ClassVar[dict[str, object]] = {
        "echo": False,
        "use_beam_search": False,
        "prompt_logprobs": 0,
        "stop_token_ids": [],
        "min_tokens": 0,
        "bad_words": [],
        "allowed_token_ids": [],
        "structured_outputs": None,
        "include_stop_str_in_output": False,
    }

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    logit_bias: Biases | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    echo: Refused = None
    use_beam_search: Refused = None
    prompt_logprobs: Refused = None
    stop_token_ids: Refused = None
    min_tokens: Refused = None
    bad_words: Refused = None
    allowed_token_ids: Refused = None
    structured_outputs: Refused = None
    include_stop_str_in_output: Refused = None


class CompletionBody(OpenAIBody, frozen=True, kw_only=True):
    unserved: ClassVar[dict[str, object]] = OpenAIBody.unserved | {"suffix": ""}

    prompt: Text | Prompts
    logprobs: Alternatives | None = None
    best_of: Choices | None = None
    suffix: Refused = None


def parse_completion(data: Body) -> ParsedRequest:
    """Raises HTTPError."""
    body = decode(data, _completion)
    refuse_unserved(body, body.unserved)
    if body.best_of is not None and body.best_of != (body.n or 1):
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
    return replace(parameters(body, max_tokens), logit_bias=body.logit_bias or {})
