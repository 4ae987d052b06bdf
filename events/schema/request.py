"""The life of a request: subjects `request`, `work` and `cancel` of one shard; and its gateway's lane."""

from typing import Annotated, Literal

import msgspec

from events.schema.shapes import (
    Account,
    CancelReason,
    Event,
    FinishReason,
    Kind,
    Natural,
    Plan,
    ReleaseReason,
    Shape,
)


class ToolCall(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """`arguments` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


class Message(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """One turn. `tool_call_id` is of a tool's turn: the call that it answers."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str = ""
    name: str | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


class Tool(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """A function that the model may call. `parameters` is a JSON schema, as JSON text."""

    name: str
    description: str | None = None
    parameters: str | None = None
    strict: bool = False


class ResponseFormat(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """What the answer has to be. `schema` is JSON text."""

    type: Literal["json_object", "json_schema"]
    name: str | None = None
    schema: str | None = None
    strict: bool = False


class Parameters(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """How to sample. An absent value is the model's own default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool = False
    raw: bool = False
    # By token id.
    logit_bias: dict[str, float] = msgspec.field(default_factory=dict)
    # How many alternatives are shown beside each token's own logprob; None: no logprobs.
    logprobs: Natural | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    tools: tuple[Tool, ...] = ()
    # `function` with `tool_name`: that one has to be called.
    tool_choice: Literal["none", "auto", "required", "function"] | None = None
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    # What the chat template is told beside the messages, as JSON text.
    template: str | None = None


class Problem(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """Why a request did not succeed, in words its sender can act on."""

    code: str
    message: str
    param: str | None = None


class RequestAccepted(Event, frozen=True, kw_only=True, omit_defaults=True):
    """A gateway took responsibility. Whatever follows, this request ends exactly once."""

    request: str
    account: Account
    key: str
    model: str
    kind: Kind
    input: str | tuple[Message, ...]
    parameters: Parameters
    stream: bool
    prompt_tokens_max: Natural
    deadline_ms: Natural
    price_version: Natural
    plan: Plan = "per_token"
    book: Natural = 0
    allowance: str | None = None
    group: str | None = None
    choice: Natural = 0
    idempotency_hash: str | None = None
    # What an event without the field means, for ever: who accepts under newer rules writes it.
    rules: int = 1
    # Goes on without a client: nobody's disconnect ends it.
    detached: bool = False
    traceparent: str | None = None
    # The client's own words on the request, given back with it.
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    # Where the key of its content stands in RIFT_SECRETS; then all that it says is in `content` (sealing.py).
    sealed: Natural | None = None
    content: str = ""


class AttemptStarted(Event, frozen=True, kw_only=True, omit_defaults=True):
    """A worker is about to give the prompt to its engine.

    It counts only if `after` is the attempt that counted last: the compare-and-set that makes
    the log's order the only fence.
    """

    request: str
    attempt: str
    after: str | None
    resume_index: Natural
    worker: str
    prompt_tokens: Natural
    accepted_at_ns: Natural
    engine: str
    model_digest: str
    delivery: str
    simulated: bool = False


class ToolCallDelta(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """What tokens add to the answer's tool call number `index`; its first delta has id and name."""

    index: Natural
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Logprob(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """A token's text, its log probability, and the most likely tokens in its place."""

    token: str
    logprob: float
    top: tuple["Logprob", ...] = ()


class TokensGenerated(Event, frozen=True, kw_only=True, omit_defaults=True):
    """Output tokens `index`, `index + 1`, …; `text`, `reasoning` and `tool_calls` are what they add to the
    answer. `logprobs`, where they are wanted, are one a token."""

    attempt: str
    index: Natural
    token_ids: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]
    text: str
    cached_tokens: Natural = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    # Of a sealed request: all of the above; `token_ids` are as many zeros.
    content: str = ""


class AttemptReleased(Event, frozen=True, kw_only=True, omit_defaults=True):
    attempt: str
    why: ReleaseReason


class Stamps(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """Intervals inside the worker, nanoseconds of its monotonic clock since it took the request."""

    engine_ns: Natural = 0
    first_token_ns: Natural | None = None
    finished_ns: Natural = 0


class RequestFinished(Event, frozen=True, kw_only=True, omit_defaults=True):
    """The end. From a worker it names its attempt; from control, none."""

    request: str
    attempt: str | None
    reason: FinishReason
    output_tokens: Natural
    error: Problem | None = None
    account: Account | None = None
    model: str | None = None
    price_version: Natural | None = None
    prompt_tokens: Natural = 0
    # Of `output_tokens`, those that were reasoning.
    reasoning_tokens: Natural = 0
    stamps: Stamps = Stamps()
    # Of a sealed request: the error with its words.
    content: str = ""


class CancelRequested(Event, frozen=True, kw_only=True, omit_defaults=True):
    """Without an attempt: the request shall end. With one: that attempt's worker shall stop."""

    request: str
    why: CancelReason
    attempt: str | None = None


class LaneOpened(Event, frozen=True, kw_only=True, omit_defaults=True):
    lane: str
    shard: Natural


class LaneReported(Event, frozen=True, kw_only=True, omit_defaults=True):
    lane: str


class LaneLost(Event, frozen=True, kw_only=True, omit_defaults=True):
    lane: str


class ClientAttached(Event, frozen=True, kw_only=True, omit_defaults=True):
    request: str
