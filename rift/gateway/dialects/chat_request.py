"""Parse the bodies of `/v1/completions` and `/v1/chat/completions`: pure functions.

Unknown fields are ignored, as clients expect. Known fields that would change the answer but are not supported
are rejected. The gateway's README lists every field.
"""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec.structs import replace

from events.schema import Kind, Message, Parameters, ResponseFormat, ToolCall
from rift.gateway.dialects.openai_fields import (
    TOOLS_MAX,
    Alternatives,
    Biases,
    Choice,
    Effort,
    Function,
    Metadata,
    Name,
    NamedFunction,
    Part,
    Refused,
    Schema,
    answered_calls,
    refuse_unserved,
    schema_text,
    text_of,
    tool,
    with_tools,
)
from rift.gateway.dialects.sampling import MaxTokens, ParsedRequest, Sampling, Text, decode, parameters, wrong

# An engine with 8 slots runs this many choices at once; more would wait for one another.
CHOICES_MAX = 8

Choices = Annotated[int, msgspec.Meta(ge=1, le=CHOICES_MAX)]


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

    prompt: Text | Annotated[list[Text], msgspec.Meta(min_length=1, max_length=1)]
    logprobs: Alternatives | None = None
    best_of: Choices | None = None
    suffix: Refused = None


class ChatTool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: Function


class ChatCalled(msgspec.Struct, frozen=True):
    name: Name
    arguments: str


class ChatCall(msgspec.Struct, frozen=True):
    id: Text
    function: ChatCalled
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ChatCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    function_call: Refused = None


class ChatNamedTool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(msgspec.Struct, frozen=True):
    name: Name
    description: str | None = None
    schema: Schema = msgspec.field(default_factory=Schema)
    strict: bool | None = None


class ChatFormat(msgspec.Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(OpenAIBody, frozen=True, kw_only=True):
    unserved: ClassVar[dict[str, object]] = OpenAIBody.unserved | {
        "audio": None,
        "chat_template": None,
        "continue_final_message": False,
        "documents": [],
        "function_call": "none",
        "functions": [],
        "modalities": ["text"],
        "web_search_options": None,
    }

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Annotated[list[ChatTool], msgspec.Meta(max_length=TOOLS_MAX)] | None = None
    tool_choice: Choice | ChatNamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ChatFormat | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    audio: Refused = None
    chat_template: Refused = None
    continue_final_message: Refused = None
    documents: Refused = None
    function_call: Refused = None
    functions: Refused = None
    modalities: Refused = None
    web_search_options: Refused = None


def parse_completion(data: bytes) -> ParsedRequest:
    """Raises HTTPError."""
    body = decode(data, _completion)
    refuse_unserved(body, body.unserved)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise wrong("best_of", "every choice is returned, so `best_of` must equal `n`; leave it out")
    prompt = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
    return _parsed(
        "completion", body, prompt, replace(_sampled(body, body.max_tokens), logprobs=body.logprobs)
    )


def parse_chat(data: bytes) -> ParsedRequest:
    """Raises HTTPError."""
    body = decode(data, _chat)
    refuse_unserved(body, body.unserved)
    if body.top_logprobs is not None and not body.logprobs:
        raise wrong("top_logprobs", "set `logprobs` to true to use it")
    choice = body.tool_choice
    sampled = replace(
        _sampled(body, body.max_completion_tokens or body.max_tokens),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        response_format=_format(body.response_format),
        reasoning_effort=body.reasoning_effort,
        template=_template(body.chat_template_kwargs),
    )
    sampled = with_tools(
        sampled,
        tuple(tool(each.function, f"tools[{at}].function") for at, each in enumerate(body.tools or ())),
        choice.function if isinstance(choice, ChatNamedTool) else choice,
        parallel=body.parallel_tool_calls,
    )
    messages = [_message(message, f"messages[{at}]") for at, message in enumerate(body.messages)]
    return _parsed("chat", body, answered_calls(messages, "messages"), sampled)


_completion = msgspec.json.Decoder(CompletionBody)
_chat = msgspec.json.Decoder(ChatBody)


def _parsed(
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


def _sampled(body: OpenAIBody, max_tokens: int | None) -> Parameters:
    return replace(parameters(body, max_tokens), logit_bias=body.logit_bias or {})


def _format(format: ChatFormat | None) -> ResponseFormat | None:
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return ResponseFormat(type="json_object")
    if format.json_schema is None:
        raise wrong("response_format.json_schema", "the type json_schema needs it")
    schema = schema_text(format.json_schema.schema, "response_format.json_schema.schema")
    return ResponseFormat(
        type="json_schema",
        name=format.json_schema.name,
        schema=schema or "{}",
        strict=bool(format.json_schema.strict),
    )


def _template(variables: dict[str, Any] | None) -> str | None:
    if not variables:
        return None
    try:
        return msgspec.json.encode(variables).decode()
    except OverflowError as error:
        raise wrong("chat_template_kwargs", f"a number is out of range: {error}") from error


def _message(message: ChatMessage, param: str) -> Message:
    if message.function_call:
        raise wrong(f"{param}.function_call", "use `tool_calls` instead", code="unsupported")
    if message.tool_calls and message.role != "assistant":
        raise wrong(f"{param}.tool_calls", "only an assistant message may have tool calls")
    if message.content is None and not (
        message.role == "assistant" and (message.tool_calls or message.refusal)
    ):
        raise wrong(f"{param}.content", "text is required, except in an assistant message with tool calls")
    if message.role == "tool" and not message.tool_call_id:
        raise wrong(f"{param}.tool_call_id", "a tool message must name the call that it answers")
    calls = (
        ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in message.tool_calls or ()
    )
    return Message(
        role=message.role,
        content=text_of(message.content, f"{param}.content") or message.refusal or "",
        name=message.name,
        reasoning=message.reasoning or message.reasoning_content or "",
        tool_calls=tuple(calls),
        tool_call_id=message.tool_call_id if message.role == "tool" else None,
    )
