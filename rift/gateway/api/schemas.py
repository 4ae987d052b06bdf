"""The types of the answers of the native API, of accounts and of the gateway, for `/openapi.json` and for the
tests that check every answer against them. `openai_schemas.py` has those of OpenAI's APIs.

The dialects build the answers themselves, because speed counts there.
"""

from typing import Annotated, Literal

import msgspec

from rift.gateway.dialects.sampling import note

Milliseconds = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]

# Fields that several types have.
InferenceId = Annotated[
    str, note("The request's id.", "req_0_yjz2ahqp6yb5dlxi_smollm2-135m_10_4tqhs2xk6f5vw3ma_7gk2wq5dbn4x")
]
ModelName = Annotated[str, note("The model's name, as in `GET /v1/models`.", "smollm2:135m")]
Created = Annotated[int, note("When the request was accepted: Unix time in seconds.", 1795431870)]
Simulated = Annotated[bool, note("True if a simulated engine wrote the answer. Otherwise absent.")]
PromptTokens = Annotated[Count, note("Tokens of the prompt, with the model's chat template.", 43)]
OutputTokens = Annotated[Count, note("Tokens of the answer, reasoning and tool calls included.", 278)]
TotalTokens = Annotated[Count, note("The sum of both.", 321)]
Seconds = Annotated[
    Count | None,
    note("Under plan per_second: the time that each attempt ran, rounded up to whole seconds. Requests that "
         "run at once share seconds on the invoice."),
]  # fmt: skip
HasMore = Annotated[bool, note("Whether another page follows: ask for it with `after`.")]
Period = Annotated[str, note("The month (UTC) as `YYYY-MM`.", "2026-11")]
PeriodStatus = Annotated[
    Literal["open", "closed"], note("An open month can still change; a closed one cannot.")
]
Nanousd = note("In nano-USD: a billion of them are one USD.", 5990)
Usd = note("The same in USD, exact.", "0.000005990")
# Positions in the log, for an audit.
Positions = Annotated[
    dict[str, int], note("For each stream of the log, the last sequence number that is included.")
]
FinishReason = Annotated[
    str | None,
    note("Why the request ended: `stop`, `length`, `tool_calls`, `cancelled`, `revoked`, `expired`, "
         "`invalid`, `failed` or `poison`. Null until then.", "stop"),
]  # fmt: skip
RequestStatus = Annotated[
    str,
    note("`queued`, `running`, `finished`, `cancelled`, or why the request failed: `invalid`, `expired`, "
         "`failed` or `poison`.", "finished"),
]  # fmt: skip


class ResponseSchema(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object in an answer, without other fields."""


class Problem(ResponseSchema, frozen=True, kw_only=True):
    """What is wrong, and what to do."""

    message: Annotated[str, note("What is wrong, and what to do.", "temperature: Expected `float` <= 2.0")]
    type: Annotated[
        str,
        note("OpenAI's name for the kind of error. It follows from the status.", "invalid_request_error"),
    ]
    param: Annotated[
        str | None, note("The field, parameter or header that is wrong, if it is one.", "temperature")
    ]
    code: Annotated[
        str, note("The cause, for programs. The answers of each route list its codes.", "invalid_value")
    ]


class Error(ResponseSchema, frozen=True, kw_only=True):
    """The body of every answer with a status from 400."""

    error: Annotated[Problem, note("The problem.")]


# --- the native route --------------------------------------------------------------------------------------


class InferenceUsage(ResponseSchema, frozen=True, kw_only=True):
    prompt_tokens: PromptTokens
    output_tokens: OutputTokens
    total_tokens: TotalTokens


class Charge(ResponseSchema, frozen=True, kw_only=True):
    """`nanousd` and `usd` or, under plan per_second, the most that the request can cost."""

    nanousd: Annotated[Count | None, Nanousd] = None
    usd: Annotated[str | None, Usd] = None
    at_most_nanousd: Annotated[
        Count | None, note("The most that the request can cost, in nano-USD. The invoice has its share.")
    ] = None
    final: Annotated[
        Literal[False] | None, note("False under plan per_second: other requests can lower the charge.")
    ] = None


RequestCharge = Annotated[
    Charge | None,
    note(
        "Null until the request has ended, and for one of several choices, which share the prompt's charge.",
        {"nanousd": 5990, "usd": "0.000005990"},
    ),
]


class Timing(ResponseSchema, frozen=True, kw_only=True):
    """Milliseconds since the request was accepted. Null for steps to come."""

    queue_ms: Annotated[Milliseconds | None, note("Until a worker started it, in ms.", 14.976)]
    ttft_ms: Annotated[Milliseconds | None, note("Until the first token was stored, in ms.", 65.281)]
    total_ms: Annotated[Milliseconds | None, note("Until its end, in ms.", 5967.274)]


class InferenceEnd(ResponseSchema, frozen=True, kw_only=True):
    """The last event of a stream: the inference without its output."""

    id: InferenceId
    object: Literal["inference"]
    model: ModelName
    created: Created
    finish_reason: FinishReason
    attempts: Annotated[Count, note("How many workers have started the request.", 1)]
    usage: Annotated[InferenceUsage, note("The tokens so far.")]
    charge: RequestCharge
    timing: Annotated[Timing, note("When each step was stored.")]
    seconds: Seconds = None
    simulated: Simulated = False


class Inference(InferenceEnd, frozen=True, kw_only=True):
    """A request and its answer so far. The answer to `POST` has no `status`, `metadata` or `error`."""

    output: Annotated[str, note("The answer's text.", "Imagine a coin that spins.")]
    reasoning: Annotated[str, note("The model's reasoning before the answer. Absent if there is none.")] = ""
    status: RequestStatus = ""
    metadata: Annotated[dict[str, str], note("As the client sent it. Absent if it is empty.")] = {}
    error: Annotated[Problem | None, note("Why the request failed. Absent if it did not.")] = None


class InferenceStatus(ResponseSchema, frozen=True, kw_only=True):
    id: InferenceId
    object: Literal["inference"]
    status: Annotated[str, note("`queued`, `running` or `cancelling`.", "queued")]


class Deleted(ResponseSchema, frozen=True, kw_only=True):
    id: Annotated[
        str,
        note("The id in the path.", "req_0_yjz2ahqp6yb5dlxi_smollm2-135m_10_4tqhs2xk6f5vw3ma_7gk2wq5dbn4x"),
    ]
    object: Annotated[Literal["inference.content", "response"], note("By the route.")]
    deleted: Literal[True]


class InferenceFacts(ResponseSchema, frozen=True, kw_only=True):
    """A request in a list. One of several choices names its group."""

    id: InferenceId
    object: Literal["inference"]
    kind: Annotated[
        Literal["inference", "completion", "chat", "response"], note("The API that the request came by.")
    ]
    model: ModelName
    status: RequestStatus
    created: Created
    finish_reason: FinishReason
    group: Annotated[
        str | None, note("The id of the group's first request, if it is one of several choices.")
    ]
    choice: Annotated[Count, note("The index of the choice in its answer.", 0)]
    usage: Annotated[InferenceUsage, note("The tokens so far.")]
    charge: RequestCharge
    seconds: Seconds = None


class InferenceList(ResponseSchema, frozen=True, kw_only=True):
    object: Literal["list"]
    data: Annotated[list[InferenceFacts], note("The requests, newest first.")]
    has_more: HasMore


class InferenceEvent(ResponseSchema, frozen=True, kw_only=True):
    """The data of the events `status`, `token` and `error` of a native stream. `done` has an InferenceEnd."""

    id: InferenceId
    status: Annotated[
        str | None,
        note("Event `status`: `queued`, `starting` (a replica of the model), or `running`.", "queued"),
    ] = None
    estimate_ms: Annotated[Count | None, note("How long the replica's start takes, in ms.", 20000)] = None
    attempt: Annotated[int | None, note("The number of the attempt that runs, from 1.", 1)] = None
    index: Annotated[int | None, note("The number of the event's first token in the answer, from 0.")] = None
    delta: Annotated[str | None, note("Event `token`: the text that it adds.", "Imagine")] = None
    reasoning: Annotated[str | None, note("Event `token`: the reasoning that it adds.")] = None
    resume: Annotated[
        str | None, note("Event `error`, if the request has not ended: the path of the rest of the stream.")
    ] = None
    error: Annotated[Problem | None, note("Event `error`: why the stream ends.")] = None


# --- accounts ----------------------------------------------------------------------------------------------


class InvoiceFacts(ResponseSchema, frozen=True, kw_only=True):
    """A month that has a charge or a correction. A closed month does not change."""

    object: Literal["invoice"]
    period: Period
    status: PeriodStatus
    total_nanousd: Annotated[int, Nanousd]
    total_usd: Annotated[str, Usd]


class InvoiceList(ResponseSchema, frozen=True, kw_only=True):
    object: Literal["list"]
    data: Annotated[list[InvoiceFacts], note("The invoices, newest first.")]
    has_more: HasMore


class LinePositions(ResponseSchema, frozen=True, kw_only=True):
    first: Annotated[str, note("Stream, sequence number and event of the first charge.", "RIFT_0:17.0")]
    last: Annotated[str, note("Those of the last.", "RIFT_0:93.0")]


class MonthInvoiceLine(ResponseSchema, frozen=True, kw_only=True):
    """The charges of one model, plan and price version."""

    model: ModelName
    plan: Annotated[str, note("`per_token`, `per_second`, or `correction`.", "per_token")]
    price_version: Annotated[int, note("The version of the prices.", 1)]
    prompt_tokens: PromptTokens
    cached_tokens: Annotated[int, note("Those of them that the prefix cache had.", 0)]
    output_tokens: OutputTokens
    seconds: Annotated[int, note("Under plan per_second: the seconds in which any of the requests ran.", 0)]
    nanousd: Annotated[int, Nanousd]
    requests: Annotated[int, note("How many requests it charges.", 1)]
    positions: Annotated[LinePositions, note("Where the charges are in the log.")]
    digest: Annotated[str, note("A SHA-256 over each charge, in the order of the log.")]


class MonthInvoice(ResponseSchema, frozen=True, kw_only=True):
    account: Annotated[str, note("The account's name.", "acme")]
    period: Period
    status: PeriodStatus
    lines: Annotated[list[MonthInvoiceLine], note("One for each model, plan and price version.")]
    total_nanousd: Annotated[int, Nanousd]
    positions: Positions


class UsageSum(ResponseSchema, frozen=True, kw_only=True):
    """The requests that ended. It has those of the first five fields that `group_by` names."""

    hour: Annotated[str, note("When the hour began, in UTC, like `2026-11-23T14:00:00Z`.")] = ""
    day: Annotated[str, note("The day (UTC).", "2026-11-23")] = ""
    model: ModelName = ""
    key: Annotated[str, note("The id of the API key: the part after `rift_`.")] = ""
    plan: Annotated[str, note("The price plan, `per_token` or `per_second`.")] = ""
    requests: Annotated[int, note("How many requests ended.", 2)]
    charged_requests: Annotated[int, note("How many of them were charged.", 2)]
    prompt_tokens: PromptTokens
    cached_tokens: Annotated[int, note("Those of them that the prefix cache had.", 0)]
    output_tokens: OutputTokens
    charge_nanousd: Annotated[int, Nanousd]


class UsageReport(ResponseSchema, frozen=True, kw_only=True):
    object: Literal["usage"]
    account: Annotated[str, note("The account's name.", "acme")]
    first_day: Annotated[str, note("The first day (UTC).", "2026-11-01")] = msgspec.field(name="from")
    last_day: Annotated[str, note("The last day (UTC), inclusive.", "2026-11-30")] = msgspec.field(name="to")
    group_by: Annotated[list[str], note("The columns by which the rows are grouped.", ["day", "model"])]
    data: Annotated[list[UsageSum], note("At most 10,000 rows, sorted by their groups.")]
    positions: Positions


# --- models ------------------------------------------------------------------------------------------------


class ModelPrice(ResponseSchema, frozen=True, kw_only=True):
    """Prices in nano-USD: a billion of them are one USD."""

    prompt_token: Annotated[Count, note("For a token of the prompt.", 10)]
    cached_prompt_token: Annotated[Count, note("For a token of the prompt that the prefix cache has.", 10)]
    output_token: Annotated[Count, note("For a token of the answer.", 20)]
    second: Annotated[
        Count | None, note("For a second, under plan per_second. Null: that plan cannot use the model.", 250)
    ]


class ModelPriceUsd(ResponseSchema, frozen=True, kw_only=True):
    """The same prices in USD: per million tokens, and per second."""

    million_prompt_tokens: Annotated[str, note("For a million tokens of prompts.", "0.010000000")]
    million_cached_prompt_tokens: Annotated[
        str, note("For a million tokens of prompts that the prefix cache has.", "0.010000000")
    ]
    million_output_tokens: Annotated[str, note("For a million tokens of answers.", "0.020000000")]
    second: Annotated[str | None, note("For a second, under plan per_second.", "0.000000250")]


class Model(ResponseSchema, frozen=True, kw_only=True):
    id: ModelName
    object: Literal["model"]
    created: Annotated[int, note("Always 0: OpenAI's clients expect the field.")]
    owned_by: Annotated[str, note("Always `rift`.", "rift")]
    title: Annotated[str, note("The name for people.", "SmolLM2 135M Instruct")]
    context_tokens: Annotated[Count, note("The most tokens of a prompt and its answer together.", 8192)]
    max_model_len: Annotated[Count, note("The same, as vLLM's clients read it.", 8192)]
    default: Annotated[bool, note("Whether it is this installation's default model.")]
    ready: Annotated[bool, note("Whether a replica can answer now. Otherwise a request waits for one.", True)]
    replicas: Annotated[Count, note("How many replicas are ready.", 1)]
    starting: Annotated[Count, note("How many replicas are starting.", 0)]
    price_nanousd: Annotated[ModelPrice | None, note("Absent if the model has no price.")] = None
    price_usd: Annotated[ModelPriceUsd | None, note("Absent if the model has no price.")] = None


class ModelList(ResponseSchema, frozen=True, kw_only=True):
    object: Literal["list"]
    data: Annotated[list[Model], note("The models that the key may use; the default model is the first.")]


# --- the gateway -------------------------------------------------------------------------------------------


class OpenConnections(ResponseSchema, frozen=True, kw_only=True):
    open: Annotated[Count, note("How many are open.", 3)]
    max: Annotated[Count, note("How many can be open at once.", 8192)]


class Health(ResponseSchema, frozen=True, kw_only=True):
    """`/readyz` has all fields, the others only `status`."""

    status: Annotated[Literal["ok", "ready"], note("By the route.")]
    models_ready: Annotated[list[str], note("The models with a ready replica.")] = []
    connections: Annotated[OpenConnections | None, note("The gateway's connections.")] = None


class Version(ResponseSchema, frozen=True, kw_only=True):
    version: Annotated[str, note("The version of Rift.", "0.1.0")]
    engine: Annotated[Literal["vllm", "sim"], note("`sim` is the simulated engine, for tests.", "vllm")]
