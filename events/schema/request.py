"""Events of a request (subjects `request`, `work` and `cancel` of one shard) and of its gateway's lane."""

from typing import Annotated, Literal

import msgspec

from events.contracts import REFUSAL_COUNTS_MAX
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
    """One turn. In a tool's turn, `tool_call_id` names the call that it answers."""

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
    """The format that the answer must have. `schema` is JSON text."""

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
    # Keyed by token id.
    logit_bias: dict[str, float] = msgspec.field(default_factory=dict)
    # The number of alternatives shown with each token's own logprob; None means no logprobs.
    logprobs: Natural | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    tools: tuple[Tool, ...] = ()
    # `function`: the model must call `tool_name`.
    tool_choice: Literal["none", "auto", "required", "function"] | None = None
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    # Further arguments of the chat template, as JSON text.
    template: str | None = None


class Problem(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """Why a request failed, in words that its sender can act on."""

    code: str
    message: str
    param: str | None = None


class RequestAccepted(Event, frozen=True, kw_only=True, omit_defaults=True):
    """A gateway accepted the request. From here on, it ends exactly once, despite any failure."""

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
    # The version of the rules. An event without the field was accepted under rules 1.
    rules: int = 1
    # A detached request continues without a client: no disconnect ends it.
    detached: bool = False
    # The client's trace and span, by W3C Trace Context, version 00.
    traceparent: str | None = None
    # The client's own labels, returned with the request.
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    # The id that the client gave this request in the header X-Request-Id.
    client_request_id: str | None = None
    # A sealed request: the sequence of its content key in RIFT_SECRETS. Its content is in `content`
    # (encryption.py).
    sealed: Natural | None = None
    content: str = ""
    # Sent with `traceparent`: at most 512 bytes for the tools that read traces.
    tracestate: str | None = None
    # Nanoseconds of the gateway's clock from the arrival of the request's head until this event is appended.
    admission_ns: Natural | None = None


class AttemptStarted(Event, frozen=True, kw_only=True, omit_defaults=True):
    """A worker is about to give the prompt to its engine.

    It counts only if `after` is the attempt that counted last. This compare-and-set makes the log's order the
    only fence.
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
    """The part of tool call number `index` that some tokens add. The first delta has id and name."""

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
    """Output tokens `index`, `index + 1`, …, and the `text`, `reasoning` and `tool_calls` that they add to
    the answer. `logprobs` has one entry per token if the request asked for them."""

    attempt: str
    index: Natural
    token_ids: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]
    text: str
    cached_tokens: Natural = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    # In a sealed request: everything above, encrypted; `token_ids` then holds as many zeros.
    content: str = ""


class AttemptReleased(Event, frozen=True, kw_only=True, omit_defaults=True):
    attempt: str
    why: ReleaseReason


class Stamps(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """Intervals inside the worker: nanoseconds of its monotonic clock since it took the job."""

    engine_ns: Natural = 0
    first_token_ns: Natural | None = None
    finished_ns: Natural = 0


class RequestFinished(Event, frozen=True, kw_only=True, omit_defaults=True):
    """The end of a request. A worker names its attempt, control none."""

    request: str
    attempt: str | None
    reason: FinishReason
    output_tokens: Natural
    error: Problem | None = None
    account: Account | None = None
    model: str | None = None
    price_version: Natural | None = None
    prompt_tokens: Natural = 0
    # The part of `output_tokens` that is reasoning.
    reasoning_tokens: Natural = 0
    stamps: Stamps = Stamps()
    # In a sealed request: the error with its message, encrypted.
    content: str = ""


class CancelRequested(Event, frozen=True, kw_only=True, omit_defaults=True):
    """Without an attempt, the request is to end. With one, that attempt's worker is to stop."""

    request: str
    why: CancelReason
    attempt: str | None = None


class LaneOpened(Event, frozen=True, kw_only=True, omit_defaults=True):
    """`metrics` is the address of its gateway's metrics, HOST:PORT, empty if it has none."""

    lane: str
    shard: Natural
    metrics: str = ""


class LaneReported(Event, frozen=True, kw_only=True, omit_defaults=True):
    """`metrics` is as in `LaneOpened`."""

    lane: str
    metrics: str = ""


class LaneLost(Event, frozen=True, kw_only=True, omit_defaults=True):
    lane: str


class RefusalCount(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """How many requests of an account were answered with an error, by its code. Without an account, the key
    was missing or not valid, or was not read."""

    account: Account | None = None
    reason: str
    count: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


class RequestsRefused(Event, frozen=True, kw_only=True, omit_defaults=True):
    """What a gateway answered with a status of 400 or more since its last report, on any route.

    `other` counts those for which `counts` has no room. A report may be stored twice: it counts if it begins
    where the lane's last one ends, or later. Times are the broker's, as the gateway estimates them.
    """

    lane: str
    shard: Natural
    from_at_ns: Natural
    to_at_ns: Natural
    counts: Annotated[tuple[RefusalCount, ...], msgspec.Meta(max_length=REFUSAL_COUNTS_MAX)]
    other: Natural = 0


class ClientAttached(Event, frozen=True, kw_only=True, omit_defaults=True):
    request: str


class ContentErased(Event, frozen=True, kw_only=True, omit_defaults=True):
    """A client had the content of a sealed request erased. Its content key, sequence `sealed` of
    RIFT_SECRETS, is deleted next, and a restore deletes it again from an older copy."""

    request: str
    sealed: Natural
