"""Parse the bodies of `/v1/responses`: pure functions, with errors that name the field.

FIELDS.md lists every field.
"""

from itertools import groupby
from typing import Annotated, Any, Literal

import msgspec
from msgspec.structs import replace

from events.schema import Message, Tool, ToolCall
from rift.gateway.dialects.answer_format import (
    FormatBody,
    TextFormat,
    of_response,
    with_structured_outputs,
)
from rift.gateway.dialects.openai_fields import (
    PARALLEL,
    TOOLS_MAX,
    VERBOSITY,
    Alternatives,
    Choice,
    Effort,
    Function,
    Name,
    NamedFunction,
    Part,
    Verbosity,
    template,
    text_of,
    tool,
    with_tools,
)
from rift.gateway.dialects.sampling import (
    Body,
    MaxTokens,
    ParsedRequest,
    Text,
    decode,
    note,
    parameters,
    wrong,
)
from rift.gateway.dialects.support import check_support, ignored, refused

LOGPROBS = "message.output_text.logprobs"
Role = Literal["system", "developer", "user", "assistant"]


class ResponseTool(Function, frozen=True, kw_only=True):
    type: Literal["function"]


class ResponseNamedTool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    name: Annotated[Name, note("The name of a function in `tools`.", "weather")]


class TextOptions(msgspec.Struct, frozen=True):
    format: Annotated[TextFormat | None, note("The format of the text.")] = None
    verbosity: Annotated[Verbosity | None, note(VERBOSITY)] = None


class ReasoningOptions(msgspec.Struct, frozen=True):
    effort: Annotated[Effort | None, note("Passed to the model's chat template.", "low")] = None
    context: Annotated[Any, refused("auto")] = None
    mode: Annotated[Any, refused("standard")] = None
    summary: Annotated[Any, ignored("the output contains the reasoning")] = None
    generate_summary: Annotated[Any, ignored("the output contains the reasoning")] = None


class Item(msgspec.Struct, frozen=True):
    """A message, a function call, its output, or reasoning. Without a `type` it is a message."""

    type: Annotated[
        str | None,
        note("`message`, `function_call`, `function_call_output` or `reasoning`.", "message"),
    ] = None
    role: Annotated[Role | None, note("Of a message: who says it.", "user")] = None
    content: Annotated[
        str | list[Part] | None, note("Of a message or reasoning: the text, or text parts.", "hi")
    ] = None
    call_id: Annotated[str | None, note("Of a call, and of the output to it.", "call_1")] = None
    name: Annotated[str | None, note("Of a call: the function.", "weather")] = None
    arguments: Annotated[str | None, note("Of a call: JSON, as the model wrote it.", '{"city": "Paris"}')] = (
        None
    )
    output: Annotated[str | list[Part] | None, note("What the function returned.", "rain")] = None
    summary: Annotated[list[Part] | None, note("Of reasoning: its text, if it has no `content`.")] = None


class ResponseBody(FormatBody, frozen=True, kw_only=True):
    input: Annotated[
        Text | Annotated[list[Item], msgspec.Meta(min_length=1)],
        note(
            "Text, or items: messages, function_call, function_call_output, reasoning. A newline joins the "
            "text parts of an item."
        ),
    ]
    instructions: Annotated[str | None, note("The first system message.")] = None
    max_output_tokens: Annotated[
        MaxTokens | None,
        note("Takes precedence over `max_tokens`. A response that reaches it is `incomplete`."),
    ] = None
    background: Annotated[
        bool | None,
        note(
            "Runs without a client. `GET /v1/responses/{id}` returns the response, and "
            "`?stream=true&starting_after=N` its events after number N."
        ),
    ] = None
    include: Annotated[
        list[str] | None,
        note(
            f"`{LOGPROBS}`. Others are ignored: reasoning is never encrypted, and there are no other tools."
        ),
    ] = None
    tools: Annotated[
        Annotated[list[ResponseTool], msgspec.Meta(max_length=TOOLS_MAX)] | None,
        note("Functions, up to 128; other types are refused."),
    ] = None
    tool_choice: Annotated[
        Choice | ResponseNamedTool | None, note("none, auto, required, or a function by name.")
    ] = None
    parallel_tool_calls: Annotated[bool | None, note(PARALLEL)] = None
    text: Annotated[
        TextOptions | None, note(f"`format`: text, json_object, json_schema. `verbosity`: {VERBOSITY}")
    ] = None
    reasoning: Annotated[
        ReasoningOptions | None,
        note("`effort`. The summary is ignored, because the output contains the reasoning; other values of "
             "`context` than auto, and of `mode` than standard, are refused."),
    ] = None  # fmt: skip
    top_logprobs: Annotated[
        Alternatives | None, note("How many of the likeliest tokens to show for each token.")
    ] = None
    truncation: Annotated[Any, refused("disabled", advice="shorten the input")] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, note("Further variables of the chat template.")
    ] = None
    context_management: Annotated[Any, refused()] = None
    conversation: Annotated[Any, refused(advice="send the messages instead")] = None
    enable_response_messages: Annotated[Any, refused(False)] = None
    previous_input_messages: Annotated[Any, refused(advice="send the messages in `input`")] = None
    previous_response_id: Annotated[Any, refused(advice="send the messages instead")] = None
    prompt: Annotated[Any, refused(advice="use `input`")] = None
    access_programs: Annotated[Any, ignored("it is for OpenAI's own models")] = None
    background_options: Annotated[Any, ignored("all requests have the same priority")] = None
    image: Annotated[Any, ignored("only text is read")] = None
    max_tool_calls: Annotated[Any, ignored("it limits OpenAI's own tools, which are refused")] = None
    stream_options: Annotated[Any, ignored("no event is obfuscated")] = None


def parse(data: Body) -> ParsedRequest:
    """Raises HTTPError."""
    body = decode(data, _body)
    text = body.text or TextOptions()
    reasoning = body.reasoning or ReasoningOptions()
    check_support(body)
    choice = body.tool_choice
    sampled = replace(
        parameters(body, body.max_tokens if body.max_output_tokens is None else body.max_output_tokens),
        logit_bias=body.logit_bias or {},
        logprobs=(body.top_logprobs or 0) if body.top_logprobs or LOGPROBS in (body.include or ()) else None,
        response_format=with_structured_outputs(body, of_response(text.format), "text.format"),
        reasoning_effort=reasoning.effort or None,
        template=template(body.chat_template_kwargs, text.verbosity),
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


def _messages(body: ResponseBody) -> tuple[Message, ...]:
    first = [Message(role="system", content=body.instructions)] if body.instructions else []
    if isinstance(body.input, str):
        return (*first, Message(role="user", content=body.input))
    turns: list[Message] = []
    called: set[str] = set()
    for is_call, items in groupby(enumerate(body.input), lambda each: each[1].type == "function_call"):
        if is_call:
            # All at once: to extend a tuple call by call takes seconds for many.
            calls = tuple(_call(item, f"input[{at}]") for at, item in items)
            called.update(call.id for call in calls)
            _assistant(turns, tool_calls=calls)
            continue
        for at, item in items:
            if item.type == "function_call_output" and item.call_id not in called:
                unknown = f"no earlier item has a call {item.call_id!r}"
                words = unknown if item.call_id else "the output of a call must name the call"
                raise wrong(f"input[{at}].call_id", words)
            _add(turns, item, f"input[{at}]")
    if not turns:
        raise wrong("input", "at least one item is required")
    return (*first, *turns)


def _call(item: Item, param: str) -> ToolCall:
    if not item.call_id or item.name is None or item.arguments is None:
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
