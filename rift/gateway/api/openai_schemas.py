"""The types of the answers of OpenAI's APIs, as `schemas.py` has the others."""

from typing import Annotated, Any, Literal

import msgspec

from rift.gateway.api.schemas import (
    Count,
    Created,
    InferenceId,
    ModelName,
    OutputTokens,
    PromptTokens,
    ResponseSchema,
    Simulated,
    TotalTokens,
)
from rift.gateway.dialects.sampling import note

Index = Annotated[int, note("The number of the choice: prompt × `n` + choice, from 0.", 0)]
FunctionName = Annotated[str | None, note("The function that the model calls.", "weather")]
Arguments = Annotated[str, note("Its arguments: JSON, as the model wrote it.", '{"city": "Paris"}')]
CompletionFinish = Annotated[
    Literal["stop", "length", "tool_calls"] | None,
    note("`length`: `max_tokens` or the context is reached. Null in a chunk before the last.", "stop"),
]


# --- chat and completions ----------------------------------------------------------------------------------


class CachedTokens(ResponseSchema, frozen=True, kw_only=True):
    cached_tokens: Annotated[Count, note("Tokens of the prompt that the prefix cache had.", 0)]


class ReasoningTokens(ResponseSchema, frozen=True, kw_only=True):
    reasoning_tokens: Annotated[Count, note("Tokens of reasoning.", 0)]


class CompletionUsage(ResponseSchema, frozen=True, kw_only=True):
    """With `continuous_usage_stats`, chunks have the counts so far, without details."""

    prompt_tokens: PromptTokens
    completion_tokens: OutputTokens
    total_tokens: TotalTokens
    prompt_tokens_details: Annotated[CachedTokens | None, note("A part of `prompt_tokens`.")] = None
    completion_tokens_details: Annotated[ReasoningTokens | None, note("A part of `completion_tokens`.")] = (
        None
    )


ChunkUsage = Annotated[
    CompletionUsage | None,
    note("In a chunk: if the client asked for it with `stream_options`."),
]


class TokenLogprob(ResponseSchema, frozen=True, kw_only=True):
    token: Annotated[str, note("The token's text.", "Hello")]
    logprob: Annotated[float, note("The natural logarithm of its probability.", -0.5)]
    bytes: Annotated[
        list[Annotated[int, msgspec.Meta(ge=0, le=255)]], note("The token's text in UTF-8.", [72, 105])
    ]
    top_logprobs: Annotated[
        list["TokenLogprob"], note("The likeliest tokens in its place: as many as the client asked for.")
    ] = msgspec.field(default_factory=list)


class ChatLogprobs(ResponseSchema, frozen=True, kw_only=True):
    content: Annotated[list[TokenLogprob], note("One for each token.")]
    refusal: Annotated[None, note("Always null.")]


class CalledFunction(ResponseSchema, frozen=True, kw_only=True):
    arguments: Arguments
    name: FunctionName = None


class ChatToolCall(ResponseSchema, frozen=True, kw_only=True):
    """In a chunk it has an index. Only the first chunk of an index has id, type and name."""

    function: Annotated[CalledFunction, note("What the model calls. In a chunk: what it adds.")]
    index: Annotated[int | None, note("In a chunk: the number of the call, from 0.", 0)] = None
    id: Annotated[str | None, note("The call's id, for `tool_call_id` of the answer to it.")] = None
    type: Annotated[Literal["function"] | None, note("Always `function`.")] = None


class ChatAnswer(ResponseSchema, frozen=True, kw_only=True):
    """A message or, in a chunk, an addition to it."""

    role: Annotated[
        Literal["assistant"] | None, note("In a stream: only in the first chunk.", "assistant")
    ] = None
    content: Annotated[str | None, note("The text. Null if there are only tool calls.", "Hello!")] = None
    refusal: Annotated[None, note("Always null.")] = None
    reasoning: Annotated[str | None, note("The model's reasoning before the text.")] = None
    reasoning_content: Annotated[str | None, note("The same, as other clients read it.")] = None
    tool_calls: Annotated[list[ChatToolCall] | None, note("The functions that the model calls.")] = None


ChoiceLogprobs = Annotated[ChatLogprobs | None, note("Null unless the client asked for `logprobs`.")]


class ChatChoice(ResponseSchema, frozen=True, kw_only=True):
    index: Index
    logprobs: ChoiceLogprobs
    message: Annotated[ChatAnswer, note("The answer.")]
    finish_reason: Annotated[
        Literal["stop", "length", "tool_calls"],
        note("`length`: `max_tokens` or the context is reached.", "stop"),
    ]


class ChatChunkChoice(ResponseSchema, frozen=True, kw_only=True):
    index: Index
    logprobs: ChoiceLogprobs
    delta: Annotated[ChatAnswer, note("What the chunk adds.")]
    finish_reason: CompletionFinish


class CompletionLogprobs(ResponseSchema, frozen=True, kw_only=True):
    tokens: Annotated[list[str], note("The text of each token.")]
    token_logprobs: Annotated[list[float], note("The natural logarithm of each token's probability.")]
    top_logprobs: Annotated[
        list[dict[str, float]], note("For each token, the likeliest ones and itself, by their text.")
    ]
    text_offset: Annotated[list[int], note("Where each token begins in the text, in characters.")]


class CompletionChoice(ResponseSchema, frozen=True, kw_only=True):
    index: Index
    text: Annotated[str, note("The text, or what the chunk adds.", " and then")]
    logprobs: Annotated[CompletionLogprobs | None, note("Null unless the client asked for `logprobs`.")]
    finish_reason: CompletionFinish


class ChatCompletion(ResponseSchema, frozen=True, kw_only=True):
    id: InferenceId
    object: Literal["chat.completion"]
    created: Created
    model: ModelName
    choices: Annotated[list[ChatChoice], note("The choices, by their index.")]
    usage: Annotated[CompletionUsage, note("The tokens of all choices; each prompt counts once.")]
    simulated: Simulated = False


class ChatCompletionChunk(ResponseSchema, frozen=True, kw_only=True):
    id: InferenceId
    object: Literal["chat.completion.chunk"]
    created: Created
    model: ModelName
    choices: Annotated[list[ChatChunkChoice], note("One choice; none in the chunk that ends with usage.")]
    usage: ChunkUsage = None
    simulated: Simulated = False


class Completion(ResponseSchema, frozen=True, kw_only=True):
    """A completion, or a chunk of its stream."""

    id: InferenceId
    object: Literal["text_completion"]
    created: Created
    model: ModelName
    choices: Annotated[list[CompletionChoice], note("The choices, by their index. In a chunk one or none.")]
    usage: ChunkUsage = None
    simulated: Simulated = False


# --- responses ---------------------------------------------------------------------------------------------

ItemId = Annotated[str, note("The item's id.", "msg_4tqhs2xk6f5vw3ma_0")]
Logprobs = Annotated[list[TokenLogprob], note("One for each token, if the client asked for them.")]


class InputTokensDetails(ResponseSchema, frozen=True, kw_only=True):
    cached_tokens: Annotated[Count, note("Tokens of the prompt that the prefix cache had.", 0)]
    cache_write_tokens: Annotated[Count, note("Always 0.", 0)]


class ResponseUsage(ResponseSchema, frozen=True, kw_only=True):
    input_tokens: PromptTokens
    input_tokens_details: Annotated[InputTokensDetails, note("A part of `input_tokens`.")]
    output_tokens: OutputTokens
    output_tokens_details: Annotated[ReasoningTokens, note("A part of `output_tokens`.")]
    total_tokens: TotalTokens


class ResponsePart(ResponseSchema, frozen=True, kw_only=True):
    type: Annotated[Literal["output_text", "reasoning_text"], note("By the item's type.")]
    text: Annotated[str, note("The text.", "Hello!")]
    annotations: Annotated[list[Any], note("Always empty.")] = msgspec.field(default_factory=list)
    logprobs: Logprobs = msgspec.field(default_factory=list)


class ResponseItem(ResponseSchema, frozen=True, kw_only=True):
    """A message, reasoning, or a function call."""

    id: ItemId
    type: Annotated[Literal["message", "reasoning", "function_call"], note("What the item is.", "message")]
    status: Annotated[
        Literal["in_progress", "completed", "incomplete"], note("Only the last item can be unfinished.")
    ]
    role: Annotated[Literal["assistant"] | None, note("Of a message.")] = None
    content: Annotated[
        list[ResponsePart] | None,
        note("Of a message or reasoning: one part.", [{"type": "output_text", "text": "Hello!"}]),
    ] = None
    summary: Annotated[list[Any] | None, note("Of reasoning: always empty.")] = None
    call_id: Annotated[str | None, note("Of a call: its id, for `call_id` of the output to it.")] = None
    name: Annotated[str | None, note("Of a call: the function.")] = None
    arguments: Annotated[str | None, note("Of a call: JSON, as the model wrote it.")] = None


class ResponseProblem(ResponseSchema, frozen=True, kw_only=True):
    """Why a response failed."""

    code: Annotated[
        Literal["server_error", "invalid_prompt", "context_length_exceeded"],
        note("As OpenAI's clients know."),
    ]
    message: Annotated[str, note("What is wrong, and what to do.")]
    param: Annotated[str | None, note("The field that is wrong, if it is one.")]
    type: Annotated[str, note("Rift's own code for the error.", "expired")]


class Incomplete(ResponseSchema, frozen=True, kw_only=True):
    reason: Literal["max_output_tokens"]


USAGE = {
    "input_tokens": 43,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 278,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 321,
}


class Response(ResponseSchema, frozen=True, kw_only=True):
    """A response so far. Fields without words of their own are as the client sent them."""

    id: Annotated[
        str,
        note("The response's id: that of its request, with `resp_` instead of `req_`.",
             "resp_0_yjz2ahqp6yb5dlxi_smollm2-135m_10_4tqhs2xk6f5vw3ma_7gk2wq5dbn4x"),
    ]  # fmt: skip
    object: Literal["response"]
    created_at: Created
    status: Annotated[
        Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"],
        note("`incomplete`: it reached `max_output_tokens`, or the end of the context.", "completed"),
    ]
    background: Annotated[bool, note("Whether it runs without a client.")]
    error: Annotated[ResponseProblem | None, note("Why it failed, if it did.")]
    incomplete_details: Annotated[Incomplete | None, note("Why it is incomplete, if it is.")]
    instructions: Annotated[None, note("Always null: they are part of the stored messages.")]
    max_output_tokens: Annotated[int | None, note("The limit of output tokens, as the client sent it.")]
    metadata: Annotated[dict[str, str], note("As the client sent it.")]
    model: ModelName
    output: Annotated[list[ResponseItem], note("The items, in the order in which the model wrote them.")]
    parallel_tool_calls: Annotated[bool, note("As the client sent it.")]
    previous_response_id: Annotated[None, note("Always null.")]
    reasoning: Annotated[dict[str, str | None], note("`effort`, as the client sent it.")]
    temperature: Annotated[float | None, note("As the client sent it.")]
    text: Annotated[dict[str, Any], note("`format`, as the client sent it.", {"format": {"type": "text"}})]
    tool_choice: Annotated[str | dict[str, str], note("As the client sent it; `auto` by default.", "auto")]
    tools: Annotated[list[dict[str, Any]], note("As the client sent them.")]
    top_logprobs: Annotated[int | None, note("As the client sent it.")]
    top_p: Annotated[float | None, note("As the client sent it.")]
    truncation: Literal["disabled"]
    usage: Annotated[ResponseUsage | None, note("The tokens. Null until it has ended.", USAGE)]
    simulated: Simulated = False


class ResponseEvent(ResponseSchema, frozen=True, kw_only=True):
    """An event of a stream. Its type determines its other fields."""

    type: Annotated[str, note("The event's name, as in its `event:` line.", "response.output_text.delta")]
    sequence_number: Annotated[
        Count, note("The event's number, from 0: `starting_after` continues after it.", 4)
    ]
    response: Annotated[Response | None, note("The response so far; the last event has all of it.")] = None
    output_index: Annotated[int | None, note("The number of the item in `output`, from 0.", 0)] = None
    content_index: Annotated[int | None, note("The number of the part in the item: 0.", 0)] = None
    item_id: Annotated[str | None, note("The id of the item that the event adds to.")] = None
    item: Annotated[ResponseItem | None, note("The item that begins or ends.")] = None
    part: Annotated[ResponsePart | None, note("The part that begins or ends.")] = None
    delta: Annotated[str | None, note("The text, reasoning or arguments that the event adds.", "Hello")] = (
        None
    )
    text: Annotated[str | None, note("The whole text of the part that ends.")] = None
    name: FunctionName = None
    arguments: Annotated[str | None, note("The whole arguments of the call that ends.")] = None
    logprobs: Annotated[list[TokenLogprob] | None, note("One for each token that the event adds.")] = None
    code: Annotated[str | None, note("Event `error`: the cause, for programs.")] = None
    message: Annotated[str | None, note("Event `error`: what is wrong, and what to do.")] = None
    param: Annotated[str | None, note("Event `error`: the parameter that is wrong, if it is one.")] = None
