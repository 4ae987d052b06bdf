"""The types of all answers, for `/openapi.json` and for the tests that check every answer against them.

The dialects build the answers themselves, because speed counts there.
"""

from typing import Annotated, Any, Literal

import msgspec

Milliseconds = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class ResponseSchema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object in an answer, without other fields."""


class Problem(ResponseSchema, frozen=True, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str


class Error(ResponseSchema, frozen=True, kw_only=True):
    error: Problem


# --- the native route --------------------------------------------------------------------------------------


class InferenceUsage(ResponseSchema, frozen=True, kw_only=True):
    prompt_tokens: Count
    output_tokens: Count
    total_tokens: Count


class Charge(ResponseSchema, frozen=True, kw_only=True):
    """`nanousd` and `usd` or, under plan per_second, the most that the request can cost."""

    nanousd: Count | None = None
    usd: str | None = None
    at_most_nanousd: Count | None = None
    final: Literal[False] | None = None


class Timing(ResponseSchema, frozen=True, kw_only=True):
    queue_ms: Milliseconds | None
    ttft_ms: Milliseconds | None
    total_ms: Milliseconds | None


class InferenceEnd(ResponseSchema, frozen=True, kw_only=True):
    """The last event of a stream: the inference without its output."""

    id: str
    object: Literal["inference"]
    model: str
    created: int
    finish_reason: str | None
    attempts: Count
    usage: InferenceUsage
    charge: Charge | None
    timing: Timing
    # Under plan per_second.
    seconds: Count | None = None
    simulated: bool = False


class Inference(InferenceEnd, frozen=True, kw_only=True):
    output: str
    reasoning: str = ""
    status: str = ""
    metadata: dict[str, str] = {}
    error: Problem | None = None


class InferenceStatus(ResponseSchema, frozen=True, kw_only=True):
    id: str
    object: Literal["inference"]
    status: str


class Deleted(ResponseSchema, frozen=True, kw_only=True):
    id: str
    object: Literal["inference.content", "response"]
    deleted: Literal[True]


class InferenceFacts(ResponseSchema, frozen=True, kw_only=True):
    """A request in a list. One of several choices names its group."""

    id: str
    object: Literal["inference"]
    kind: Literal["inference", "completion", "chat", "response"]
    model: str
    status: str
    created: int
    finish_reason: str | None
    group: str | None
    choice: Count
    usage: InferenceUsage
    charge: Charge | None
    # Under plan per_second.
    seconds: Count | None = None


class InferenceList(ResponseSchema, frozen=True, kw_only=True):
    object: Literal["list"]
    data: list[InferenceFacts]
    has_more: bool


class InvoiceFacts(ResponseSchema, frozen=True, kw_only=True):
    """A month that has a charge or a correction. A closed month does not change."""

    object: Literal["invoice"]
    period: str
    status: Literal["open", "closed"]
    total_nanousd: int
    total_usd: str


class InvoiceList(ResponseSchema, frozen=True, kw_only=True):
    object: Literal["list"]
    data: list[InvoiceFacts]
    has_more: bool


class InferenceEvent(ResponseSchema, frozen=True, kw_only=True):
    """The data of the events `status`, `token` and `error` of a native stream. `done` has an InferenceEnd."""

    id: str
    status: str | None = None
    attempt: int | None = None
    index: int | None = None
    delta: str | None = None
    reasoning: str | None = None
    resume: str | None = None
    error: Problem | None = None


# --- chat and completions ----------------------------------------------------------------------------------


class CachedTokens(ResponseSchema, frozen=True, kw_only=True):
    cached_tokens: Count


class ReasoningTokens(ResponseSchema, frozen=True, kw_only=True):
    reasoning_tokens: Count


class CompletionUsage(ResponseSchema, frozen=True, kw_only=True):
    """With `continuous_usage_stats`, chunks have the counts so far, without details."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: CachedTokens | None = None
    completion_tokens_details: ReasoningTokens | None = None


class TokenLogprob(ResponseSchema, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[Annotated[int, msgspec.Meta(ge=0, le=255)]]
    top_logprobs: list["TokenLogprob"] = []


class ChatLogprobs(ResponseSchema, frozen=True, kw_only=True):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(ResponseSchema, frozen=True, kw_only=True):
    arguments: str
    name: str | None = None


class ChatToolCall(ResponseSchema, frozen=True, kw_only=True):
    """In a chunk it has an index. Only the first chunk of an index has id, type and name."""

    function: CalledFunction
    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None


class ChatAnswer(ResponseSchema, frozen=True, kw_only=True):
    """A message or, in a chunk, an addition to it."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ChatToolCall] | None = None


FinishReason = Literal["stop", "length", "tool_calls"]


class ChatChoice(ResponseSchema, frozen=True, kw_only=True):
    index: int
    logprobs: ChatLogprobs | None
    message: ChatAnswer
    finish_reason: FinishReason


class ChatChunkChoice(ResponseSchema, frozen=True, kw_only=True):
    index: int
    logprobs: ChatLogprobs | None
    delta: ChatAnswer
    finish_reason: FinishReason | None


class CompletionLogprobs(ResponseSchema, frozen=True, kw_only=True):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(ResponseSchema, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletion(ResponseSchema, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    simulated: bool = False


class ChatCompletionChunk(ResponseSchema, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: CompletionUsage | None = None
    simulated: bool = False


class Completion(ResponseSchema, frozen=True, kw_only=True):
    """A completion, or a chunk of its stream. A chunk has `usage` if the client asked for it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: CompletionUsage | None = None
    simulated: bool = False


# --- responses ---------------------------------------------------------------------------------------------


class InputTokensDetails(ResponseSchema, frozen=True, kw_only=True):
    cached_tokens: Count
    cache_write_tokens: Count


class ResponseUsage(ResponseSchema, frozen=True, kw_only=True):
    input_tokens: Count
    input_tokens_details: InputTokensDetails
    output_tokens: Count
    output_tokens_details: ReasoningTokens
    total_tokens: Count


class ResponsePart(ResponseSchema, frozen=True, kw_only=True):
    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class ResponseItem(ResponseSchema, frozen=True, kw_only=True):
    """A message, reasoning, or a function call."""

    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] | None = None
    content: list[ResponsePart] | None = None
    summary: list[Any] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class ResponseProblem(ResponseSchema, frozen=True, kw_only=True):
    code: Literal["server_error", "invalid_prompt", "context_length_exceeded"]
    message: str
    param: str | None
    type: str


class Incomplete(ResponseSchema, frozen=True, kw_only=True):
    reason: Literal["max_output_tokens"]


class Response(ResponseSchema, frozen=True, kw_only=True):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: ResponseProblem | None
    incomplete_details: Incomplete | None
    instructions: None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[ResponseItem]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, str | None]
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, str]
    tools: list[dict[str, Any]]
    top_logprobs: int | None
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    simulated: bool = False


class ResponseEvent(ResponseSchema, frozen=True, kw_only=True):
    """An event of a stream. Its type determines its other fields."""

    type: str
    sequence_number: Count
    response: Response | None = None
    output_index: int | None = None
    content_index: int | None = None
    item_id: str | None = None
    item: ResponseItem | None = None
    part: ResponsePart | None = None
    delta: str | None = None
    text: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[TokenLogprob] | None = None
    code: str | None = None
    message: str | None = None
    param: str | None = None


# --- the rest ----------------------------------------------------------------------------------------------


class ModelPrice(ResponseSchema, frozen=True, kw_only=True):
    """`second` is null if the model has no price under plan per_second."""

    prompt_token: Count
    cached_prompt_token: Count
    output_token: Count
    second: Count | None


class ModelPriceUsd(ResponseSchema, frozen=True, kw_only=True):
    """The same prices in USD: per million tokens, and per second."""

    million_prompt_tokens: str
    million_cached_prompt_tokens: str
    million_output_tokens: str
    second: str | None


class Model(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    title: str
    context_tokens: Count
    max_model_len: Count
    default: bool
    ready: bool
    price_nanousd: ModelPrice | None = None
    price_usd: ModelPriceUsd | None = None


class ModelList(ResponseSchema, frozen=True, kw_only=True):
    object: Literal["list"]
    data: list[Model]


class OpenConnections(ResponseSchema, frozen=True, kw_only=True):
    open: Count
    max: Count


class Health(ResponseSchema, frozen=True, kw_only=True):
    status: Literal["ok", "ready"]
    models_ready: list[str] = []
    connections: OpenConnections | None = None


class Version(ResponseSchema, frozen=True, kw_only=True):
    version: str
    engine: Literal["vllm", "sim"]
