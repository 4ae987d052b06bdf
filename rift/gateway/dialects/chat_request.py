"""Parse the body of `/v1/chat/completions`: pure functions. Fields that it shares with completions are in
`completions_request.py`; FIELDS.md lists every field."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec.structs import replace

from events.schema import Message, ToolCall
from rift.gateway.dialects.completions_request import OpenAIBody, parsed_request, sampling_of
from rift.gateway.dialects.openai_fields import (
    PARALLEL,
    TOOLS_MAX,
    VERBOSITY,
    Alternatives,
    Choice,
    Effort,
    Function,
    NamedFunction,
    Part,
    Verbosity,
    template,
    text_of,
    tool,
    with_tools,
)
from rift.gateway.dialects.sampling import Body, MaxTokens, ParsedRequest, Text, decode, note, wrong
from rift.gateway.dialects.support import ignored, refused


class ChatTool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: Annotated[Function, note("The function.")]


class ChatCalled(msgspec.Struct, frozen=True):
    name: Annotated[str, note("The function's name, as the model wrote it.", "weather")]
    arguments: Annotated[str, note("Its arguments: JSON, as the model wrote it.", '{"city": "Paris"}')]


class ChatCall(msgspec.Struct, frozen=True):
    id: Annotated[Text, note("The call's id. A tool message answers it by this id.", "call_1")]
    function: Annotated[ChatCalled, note("What the model called.")]
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct, frozen=True):
    role: Annotated[Literal["system", "developer", "user", "assistant", "tool"], note("Who says it.", "user")]
    content: Annotated[
        str | list[Part] | None, note("The text, or text parts, which a newline joins.", "hi")
    ] = None
    name: Annotated[str | None, note("The speaker's name, for chat templates that show it.")] = None
    tool_calls: Annotated[list[ChatCall] | None, note("The assistant's calls of functions.")] = None
    tool_call_id: Annotated[str | None, note("The call that a tool message answers.", "call_1")] = None
    reasoning: Annotated[str | None, note("The assistant's reasoning before its text.")] = None
    reasoning_content: Annotated[str | None, note("The same, by its other name.")] = None
    refusal: Annotated[str | None, note("The assistant's text, if it has no `content`.")] = None
    function_call: Annotated[Any, note("Refused unless empty: use `tool_calls`.")] = None


class ChatNamedTool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: Annotated[NamedFunction, note("The function that the model must call.")]


class ChatBody(OpenAIBody, frozen=True, kw_only=True):
    messages: Annotated[
        list[ChatMessage],
        msgspec.Meta(
            min_length=1,
            description="Roles system, developer, user, assistant and tool. Content is text or parts of type "
            "text, which a newline joins; other parts are refused. An assistant message may have "
            "`tool_calls`, `reasoning` or `reasoning_content`, and needs no content; a tool message names a "
            "call in an earlier message.",
        ),
    ]
    max_completion_tokens: Annotated[MaxTokens | None, note("Takes precedence over `max_tokens`.")] = None
    logprobs: Annotated[bool | None, note("If true, the answer has the log probability of each token.")] = (
        None
    )
    top_logprobs: Annotated[Alternatives | None, note("With `logprobs`.")] = None
    tools: Annotated[
        Annotated[list[ChatTool], msgspec.Meta(max_length=TOOLS_MAX)] | None,
        note("Functions, up to 128; other types are refused."),
    ] = None
    tool_choice: Annotated[
        Choice | ChatNamedTool | None, note("none, auto, required, or a function by name.")
    ] = None
    parallel_tool_calls: Annotated[bool | None, note(PARALLEL)] = None
    reasoning_effort: Annotated[Effort | None, note("Passed to the model's chat template.")] = None
    verbosity: Annotated[Verbosity | None, note(VERBOSITY)] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, note("Further variables of the chat template.")
    ] = None
    add_generation_prompt: Annotated[Any, refused(True)] = None
    add_special_tokens: Annotated[Any, refused(False)] = None
    audio: Annotated[Any, refused()] = None
    chat_template: Annotated[Any, refused()] = None
    continue_final_message: Annotated[Any, refused(False)] = None
    documents: Annotated[Any, refused(advice="write them into a message")] = None
    function_call: Annotated[Any, refused("none", "auto", advice="use `tool_choice`")] = None
    functions: Annotated[Any, refused(advice="use `tools`")] = None
    modalities: Annotated[Any, refused(["text"])] = None
    web_search_options: Annotated[Any, refused()] = None
    prediction: Annotated[Any, ignored("it is a hint for speed")] = None


def parse_chat(data: Body) -> ParsedRequest:
    """Raises HTTPError."""
    body = decode(data, _chat)
    if body.top_logprobs and not body.logprobs:
        raise wrong("top_logprobs", "set `logprobs` to true to use it")
    choice = body.tool_choice
    sampled = replace(
        sampling_of(
            body, body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        ),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        reasoning_effort=body.reasoning_effort or None,
        template=template(body.chat_template_kwargs, body.verbosity),
    )
    sampled = with_tools(
        sampled,
        tuple(tool(each.function, f"tools[{at}].function") for at, each in enumerate(body.tools or ())),
        choice.function if isinstance(choice, ChatNamedTool) else choice,
        parallel=body.parallel_tool_calls,
    )
    messages = [_message(message, f"messages[{at}]") for at, message in enumerate(body.messages)]
    return parsed_request("chat", body, _answered_calls(messages), sampled)


_chat = msgspec.json.Decoder(ChatBody)


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


def _answered_calls(messages: list[Message]) -> tuple[Message, ...]:
    """Check that each tool message answers a call in an earlier message. Raises HTTPError."""
    called: set[str] = set()
    for at, message in enumerate(messages):
        called.update(call.id for call in message.tool_calls)
        if message.role == "tool" and message.tool_call_id not in called:
            words = f"no earlier message has a call {message.tool_call_id!r}"
            raise wrong(f"messages[{at}].tool_call_id", words)
    return tuple(messages)
