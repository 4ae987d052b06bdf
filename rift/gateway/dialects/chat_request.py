"""Parse the body of `/v1/chat/completions`: pure functions. Fields that it shares with completions are in
`completions_request.py`; the gateway's README lists every field."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec.structs import replace

from events.schema import Message, ResponseFormat, ToolCall
from rift.gateway.dialects.completions_request import OpenAIBody, parsed_request, sampling_of
from rift.gateway.dialects.openai_fields import (
    TOOLS_MAX,
    Alternatives,
    Choice,
    Effort,
    Function,
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
from rift.gateway.dialects.sampling import Body, MaxTokens, ParsedRequest, Text, decode, wrong


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


def parse_chat(data: Body) -> ParsedRequest:
    """Raises HTTPError."""
    body = decode(data, _chat)
    refuse_unserved(body, body.unserved)
    if body.top_logprobs is not None and not body.logprobs:
        raise wrong("top_logprobs", "set `logprobs` to true to use it")
    choice = body.tool_choice
    sampled = replace(
        sampling_of(body, body.max_completion_tokens or body.max_tokens),
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
    return parsed_request("chat", body, answered_calls(messages, "messages"), sampled)


_chat = msgspec.json.Decoder(ChatBody)


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
    # An assistant's turn that ended within its reasoning, or before any text, has none.
    if message.content is None and message.role != "assistant":
        raise wrong(f"{param}.content", "text is required, except in an assistant message")
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
