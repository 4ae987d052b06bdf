"""Every event of the log, and the record that carries them.

Events are facts in the past tense: frozen, tagged by their class name, never edited once released.
A schema only grows: a new field has a default, a removed one stays. The golden files in
`tests/events/golden/` hold every version that was ever written.

What lives here: shapes. What must not: rules (see `lifecycle.py`), bytes (`codec.py`), subjects.
"""

from typing import Annotated, Literal

import msgspec

RECORD_VERSION = 1

Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Amount = Annotated[int, msgspec.Meta(ge=-(2**63) + 1, le=2**63 - 1)]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
Period = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{4}-(0[1-9]|1[0-2])$")]
Account = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,40}$")]

Kind = Literal["inference", "completion", "chat", "response"]
Plan = Literal["per_token", "per_second"]
FinishReason = Literal[
    "stop", "length", "tool_calls", "cancelled", "revoked", "expired", "invalid", "failed", "poison"
]
ReleaseReason = Literal["draining", "host", "lost", "stalled"]
CancelReason = Literal["client", "disconnect", "superseded", "revoked", "unanswered"]


class Shape(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A part of an event."""


class Event(Shape, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag=True):
    """One fact. Where it stands in the log says when it happened."""


class Message(Shape, frozen=True, kw_only=True, omit_defaults=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


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


class Problem(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """Why a request did not succeed, in words its sender can act on."""

    code: str
    message: str
    param: str | None = None


# --- the life of a request: subjects request, work and cancel of one shard ---------------------


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


class TokensGenerated(Event, frozen=True, kw_only=True, omit_defaults=True):
    """Output tokens `index`, `index + 1`, …; `text` is what they add to the answer."""

    attempt: str
    index: Natural
    token_ids: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]
    text: str
    cached_tokens: Natural = 0


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
    stamps: Stamps = Stamps()


class CancelRequested(Event, frozen=True, kw_only=True, omit_defaults=True):
    """Without an attempt: the request shall end. With one: that attempt's worker shall stop."""

    request: str
    why: CancelReason
    attempt: str | None = None


# --- lanes ---------------------------------------------------------------------------------------


class LaneOpened(Event, frozen=True, kw_only=True, omit_defaults=True):
    lane: str
    shard: Natural


class LaneReported(Event, frozen=True, kw_only=True, omit_defaults=True):
    lane: str


class LaneLost(Event, frozen=True, kw_only=True, omit_defaults=True):
    lane: str


class ClientAttached(Event, frozen=True, kw_only=True, omit_defaults=True):
    request: str


# --- the fleet -----------------------------------------------------------------------------------


class ScaleDecided(Event, frozen=True, kw_only=True, omit_defaults=True):
    model: str
    from_replicas: Natural
    to_replicas: Natural
    reason: str
    policy: str
    positions: dict[str, int]
    decided_at_ns: Natural
    inputs: dict[str, int]
    epoch: Natural = 0


class ReplicaStarting(Event, frozen=True, kw_only=True, omit_defaults=True):
    replica: str
    model: str
    engine: str
    hardware: str = "cpu"
    gpus: Natural = 0


class ReplicaReady(Event, frozen=True, kw_only=True, omit_defaults=True):
    replica: str
    model: str
    slots: Natural
    start_ns: Natural
    context_tokens: Natural = 0


class ReplicaReported(Event, frozen=True, kw_only=True, omit_defaults=True):
    replica: str
    model: str
    running: Natural
    waiting: Natural
    kv_used_tokens: Natural = 0


class ReplicaDraining(Event, frozen=True, kw_only=True, omit_defaults=True):
    replica: str
    model: str


class ReplicaStopped(Event, frozen=True, kw_only=True, omit_defaults=True):
    replica: str
    model: str
    why: str = ""


class ReplicaLost(Event, frozen=True, kw_only=True, omit_defaults=True):
    """Its supervisor saw it end without a word: killed by its host, or by its own engine's failure."""

    replica: str
    model: str
    why: str = ""
    cause: Literal["host", "engine"] = "engine"


# --- the book: kept for ever, each with its own id -------------------------------------------------


class BookEvent(Event, frozen=True, kw_only=True, omit_defaults=True):
    """A permanent fact. Readers drop a repeated `id`."""

    id: str


class AccountOpened(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    account: Account


class KeyIssued(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """Only the SHA-256 of the whole key is stored, as lower-case hex."""

    key: str
    account: Account
    sha256: str
    scopes: tuple[str, ...] = ("inference", "usage")
    models: tuple[str, ...] | None = None
    expires_at_ns: Natural | None = None


class KeyRevoked(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    key: str
    account: Account


class Price(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """Nano-USD a token: 0.10 USD per million tokens is 100."""

    model: str
    prompt_nanousd: Natural
    output_nanousd: Natural
    cached_prompt_nanousd: Natural | None = None
    second_nanousd: Natural | None = None


class PricePublished(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """A whole price list. It holds from its position in the book until the next version."""

    version: Annotated[int, msgspec.Meta(ge=1)]
    prices: tuple[Price, ...]


class LimitsSet(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """All limits of an account; absent is unlimited. The budget is for a calendar month (UTC)."""

    account: Account
    plan: Plan = "per_token"
    budget_nanousd: Natural | None = None


class CreditGranted(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """Prepaid. An account that was ever granted credit spends nothing beyond it."""

    account: Account
    nanousd: Natural
    reason: str = ""


class CreditHeld(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """An allowance: what one gateway's lane may spend for the account until it is settled."""

    account: Account
    shard: Natural
    lane: str
    nanousd: Natural


class CreditSettled(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """What of an allowance (`hold` is its id) was spent; the rest is free again."""

    account: Account
    hold: str
    nanousd: Natural


class UsageCorrected(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """Added to the account's invoice of the period it is stored in; negative in the account's favour."""

    account: Account
    nanousd: Amount
    reason: str
    request: str | None = None
    model: str | None = None


class PeriodClosed(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """A month's invoices are final: they hold what stands up to `positions` (the last sequence of each
    stream). `roots` are the archive's manifests that end there; `digest` is over every invoice line. Every
    customer sees this event, so it names no sum."""

    period: Period
    positions: dict[str, Natural]
    roots: dict[str, Digest]
    digest: Digest


class SegmentSealed(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """Sequences `first` to `last` of a stream are archived under the manifest with this SHA-256."""

    stream: str
    first: Natural
    last: Natural
    manifest: Digest


class RecordQuarantined(BookEvent, frozen=True, kw_only=True, omit_defaults=True):
    """A record that no reader can read: from now on all pass over it alike."""

    stream: str
    sequence: Natural
    reason: str


RequestEvent = (
    RequestAccepted | AttemptStarted | TokensGenerated | AttemptReleased | RequestFinished | CancelRequested
)
LaneEvent = LaneOpened | LaneReported | LaneLost | ClientAttached
FleetEvent = (
    ScaleDecided
    | ReplicaStarting
    | ReplicaReady
    | ReplicaReported
    | ReplicaDraining
    | ReplicaStopped
    | ReplicaLost
)
BookEvents = (
    AccountOpened
    | KeyIssued
    | KeyRevoked
    | PricePublished
    | LimitsSet
    | CreditGranted
    | CreditHeld
    | CreditSettled
    | UsageCorrected
    | PeriodClosed
    | SegmentSealed
    | RecordQuarantined
)
AnyEvent = RequestEvent | LaneEvent | FleetEvent | BookEvents


class Record(Shape, frozen=True, kw_only=True, omit_defaults=False):
    """One message of the log: what one writer had to say at one moment, in its order."""

    version: int = RECORD_VERSION
    writer: str
    events: tuple[AnyEvent, ...]
