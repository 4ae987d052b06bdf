"""Bodies to what is accepted: pure functions, with errors that name the field.

The native route refuses what it does not know. OpenAI's routes ignore unknown fields, as their
clients expect, and refuse the known ones that would change the answer and are not served here.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from events.schema import Kind, Message, Parameters
from rift.gateway.http import Refusal

# The native route's promise: prompts of up to this many tokens, counted by the worker.
NATIVE_PROMPT_TOKENS_MAX = 8192

OUTPUT_TOKENS_MAX = 1 << 20
STOPS_MAX = 16
STOP_CHARACTERS_MAX = 256

Temperature = Annotated[float, msgspec.Meta(ge=0, le=2)]
TopP = Annotated[float, msgspec.Meta(gt=0, le=1)]
MinP = Annotated[float, msgspec.Meta(ge=0, le=1)]
TopK = Annotated[int, msgspec.Meta(ge=-1, le=1 << 31)]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, msgspec.Meta(gt=0, le=2)]
MaxTokens = Annotated[int, msgspec.Meta(ge=1, le=OUTPUT_TOKENS_MAX)]
Seed = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
StopString = Annotated[str, msgspec.Meta(min_length=1, max_length=STOP_CHARACTERS_MAX)]
Stop = StopString | Annotated[list[StopString], msgspec.Meta(max_length=STOPS_MAX)] | None
Text = Annotated[str, msgspec.Meta(min_length=1)]
Body = TypeVar("Body")


class Wanted(msgspec.Struct, frozen=True):
    """What a body asks for, whatever route it came by."""

    kind: Kind
    model: str
    input: str | tuple[Message, ...]
    parameters: Parameters
    stream: bool
    include_usage: bool = False
    background: bool = False
    prompt_tokens_max: int | None = None


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """What every route lets its client say of sampling."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    max_tokens: MaxTokens | None = None
    stop: Stop = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    ignore_eos: bool = False


class NativeParameters(Sampling, frozen=True, kw_only=True, forbid_unknown_fields=True):
    raw: bool = False


class NativeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: str
    prompt: Text
    parameters: NativeParameters = NativeParameters()
    stream: bool = False
    background: bool = False


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class OpenAIBody(Sampling, frozen=True, kw_only=True):
    """What OpenAI's two text routes share."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=1)] | None = None
    logit_bias: dict[str, float] | None = None


class CompletionBody(OpenAIBody, frozen=True, kw_only=True):
    prompt: Text | Annotated[list[Text], msgspec.Meta(min_length=1, max_length=1)]
    logprobs: int | None = None
    suffix: str | None = None
    echo: bool | None = None
    best_of: Annotated[int, msgspec.Meta(ge=1, le=1)] | None = None


class ContentPart(msgspec.Struct, frozen=True):
    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart]


class ChatBody(OpenAIBody, frozen=True, kw_only=True):
    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None


def native(data: bytes) -> Wanted:
    body = _decode(data, _native)
    if body.background and body.stream:
        message = "background: a background request does not stream; read its events by its id"
        raise Refusal(400, message, code="invalid_value", param="background")
    return Wanted(
        kind="inference",
        model=body.model,
        input=body.prompt,
        parameters=_parameters(body.parameters, body.parameters.max_tokens, raw=body.parameters.raw),
        stream=body.stream,
        background=body.background,
        prompt_tokens_max=NATIVE_PROMPT_TOKENS_MAX,
    )


def completion(data: bytes) -> Wanted:
    body = _decode(data, _completion)
    _refuse_unserved(body, ("logit_bias", "logprobs", "suffix", "echo"))
    prompt = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
    return _openai("completion", body, prompt, body.max_tokens)


def chat(data: bytes) -> Wanted:
    body = _decode(data, _chat)
    _refuse_unserved(body, ("logit_bias", "logprobs", "tools"))
    if (body.response_format or {"type": "text"}).get("type") != "text":
        _refuse_field("response_format")
    messages = tuple(Message(role=turn.role, content=_content(turn)) for turn in body.messages)
    return _openai("chat", body, messages, body.max_completion_tokens or body.max_tokens)


_native = msgspec.json.Decoder(NativeBody)
_completion = msgspec.json.Decoder(CompletionBody)
_chat = msgspec.json.Decoder(ChatBody)


def _decode(data: bytes, decoder: "msgspec.json.Decoder[Body]") -> Body:
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refusal(400, f"the body is not valid JSON: {error}", code="invalid_json") from error


def _invalid(message: str) -> Refusal:
    """msgspec's message ends in the JSON path: the field's name for the client."""
    words, _, path = message.partition(" - at `$")
    param = path.rstrip("`").lstrip(".") or None
    if missing := re.search(r"(?:required field|unknown field) `(.+?)`", words):
        param = f"{param}.{missing[1]}" if param else missing[1]
    return Refusal(400, f"{param}: {words}" if param else words, code="invalid_value", param=param)


def _refuse_unserved(body: OpenAIBody, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(body, name):
            _refuse_field(name)


def _refuse_field(name: str) -> None:
    raise Refusal(
        400, f"{name}: this installation does not serve it; leave it out", code="unsupported", param=name
    )


def _openai(
    kind: Kind, body: OpenAIBody, prompt: str | tuple[Message, ...], max_tokens: int | None
) -> Wanted:
    return Wanted(
        kind=kind,
        model=body.model,
        input=prompt,
        parameters=_parameters(body, max_tokens, raw=False),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
    )


def _parameters(body: Sampling, max_tokens: int | None, *, raw: bool) -> Parameters:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Parameters(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        max_tokens=max_tokens,
        stop=stop,
        seed=body.seed,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        ignore_eos=body.ignore_eos,
        raw=raw,
    )


def _content(turn: ChatMessage) -> str:
    return turn.content if isinstance(turn.content, str) else "".join(part.text for part in turn.content)
