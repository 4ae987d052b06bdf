"""Parse the bodies of `/v1/responses`: pure functions, with errors that name the field.

Unknown fields are ignored, as clients expect. Known fields that would change the answer but are not supported
are rejected. The gateway's README lists every field.
"""

from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec.structs import replace

from events.schema import Message, ResponseFormat, Tool, ToolCall
from rift.gateway.dialects.openai_fields import (
    TOOLS_MAX,
    Alternatives,
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
from rift.gateway.dialects.sampling import (
    Body,
    MaxTokens,
    ParsedRequest,
    Sampling,
    Text,
    decode,
    parameters,
    wrong,
)

LOGPROBS = "message.output_text.logprobs"
Role = Literal["system", "developer", "user", "assistant"]


class ResponseTool(Function, frozen=True, kw_only=True):
    type: Literal["function"]


class ResponseNamedTool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    name: Name


class TextFormat(msgspec.Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema: Schema = msgspec.field(default_factory=Schema)
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True):
    format: TextFormat | None = None


class ReasoningOptions(msgspec.Struct, frozen=True):
    effort: Effort | None = None


class Item(msgspec.Struct, frozen=True):
    """A message, a function call, its output, or reasoning. Without a `type` it is a message."""

    type: str | None = None
    role: Role | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    summary: list[Part] | None = None


class ResponseBody(Sampling, frozen=True, kw_only=True):
    unserved: ClassVar[dict[str, object]] = {
        "context_management": [],
        "conversation": None,
        "image": None,
        "previous_response_id": None,
        "prompt": None,
    }

    model: str
    input: Text | Annotated[list[Item], msgspec.Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    stream: bool | None = None
    background: bool | None = None
    include: list[str] | None = None
    tools: Annotated[list[ResponseTool], msgspec.Meta(max_length=TOOLS_MAX)] | None = None
    tool_choice: Choice | ResponseNamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    top_logprobs: Alternatives | None = None
    truncation: Literal["auto", "disabled"] | None = None
    context_management: Refused = None
    conversation: Refused = None
    image: Refused = None
    previous_response_id: Refused = None
    prompt: Refused = None


def parse(data: Body) -> ParsedRequest:
    """Raises HTTPError."""
    body = decode(data, _body)
    refuse_unserved(body, body.unserved)
    if body.truncation == "auto":
        raise wrong(
            "truncation",
            "`auto` is not supported; shorten the input",
            code="unsupported",
        )
    choice = body.tool_choice
    sampled = replace(
        parameters(body, body.max_output_tokens or body.max_tokens),
        logprobs=(body.top_logprobs or 0) if body.top_logprobs or LOGPROBS in (body.include or ()) else None,
        response_format=_format(body.text.format if body.text else None),
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )
    sampled = with_tools(
        sampled,
        _tools(body.tools or []),
        NamedFunction(choice.name) if isinstance(choice, ResponseNamedTool) else choice,
        parallel=body.parallel_tool_calls,
    )
    return ParsedRequest(
        kind="response",
        model=body.model,
        input=_messages(body),
        parameters=sampled,
        stream=bool(body.stream),
        background=bool(body.background),
        metadata=body.metadata or {},
        store=body.store is not False,
    )


_body = msgspec.json.Decoder(ResponseBody)


def _tools(tools: list[ResponseTool]) -> tuple[Tool, ...]:
    return tuple(tool(each, f"tools[{at}]") for at, each in enumerate(tools))


def _format(format: TextFormat | None) -> ResponseFormat | None:
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return ResponseFormat(type="json_object")
    schema = schema_text(format.schema, "text.format.schema")
    if schema is None or format.name is None:
        raise wrong("text.format", "the type json_schema needs a name and a schema")
    return ResponseFormat(type="json_schema", name=format.name, schema=schema, strict=bool(format.strict))


def _messages(body: ResponseBody) -> tuple[Message, ...]:
    first = [Message(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return (*first, Message(role="user", content=body.input))
    turns: list[Message] = []
    for is_call, items in groupby(enumerate(body.input), lambda each: each[1].type == "function_call"):
        if is_call:
            # All at once: to extend a tuple call by call takes seconds for many.
            calls = tuple(_call(item, f"input[{at}]") for at, item in items)
            _assistant(turns, tool_calls=calls)
            continue
        for at, item in items:
            _add(turns, item, f"input[{at}]")
    if not turns:
        raise wrong("input", "at least one item is required")
    return answered_calls(first + turns, "input")


def _call(item: Item, param: str) -> ToolCall:
    if not (item.call_id and item.name and item.arguments is not None):
        raise wrong(param, "a function_call needs call_id, name and arguments")
    return ToolCall(id=item.call_id, name=item.name, arguments=item.arguments)


def _add(turns: list[Message], item: Item, param: str) -> None:
    """Add an item that is not a call. Reasoning, text and calls of the assistant in a row are one message."""
    match item.type or "message":
        case "message":
            if item.role is None:
                raise wrong(f"{param}.role", "a message needs a role")
            text = text_of(item.content, f"{param}.content")
            if item.role == "assistant":
                _assistant(turns, content=text)
            else:
                turns.append(Message(role=item.role, content=text))
        case "function_call_output":
            if not item.call_id:
                raise wrong(f"{param}.call_id", "an output must name the call that it answers")
            text = text_of(item.output, f"{param}.output")
            turns.append(Message(role="tool", content=text, tool_call_id=item.call_id))
        case "reasoning":
            text = text_of(item.content or item.summary, f"{param}.content")
            _assistant(turns, reasoning=text)
        case other:
            words = f"{other!r} is not supported; use message, function_call or function_call_output"
            raise wrong(f"{param}.type", words, code="unsupported")


def _assistant(turns: list[Message], **fields: Any) -> None:
    """Extend the assistant's last message, or begin a new one if it has that content already."""
    last = turns[-1] if turns and turns[-1].role == "assistant" else None
    if last is None or (
        not fields.get("tool_calls") and (last.tool_calls or last.content or "reasoning" in fields)
    ):
        turns.append(Message(role="assistant", **fields))
    elif "tool_calls" in fields:
        turns[-1] = replace(last, tool_calls=last.tool_calls + fields["tool_calls"])
    else:
        turns[-1] = replace(last, **fields)
