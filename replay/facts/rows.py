"""The rows of the fold: one struct per fact table of `sql/tables.sql`, with its columns as fields.

A row holds ids, numbers, times and positions, never content.
"""

from typing import ClassVar

import msgspec

from events import schema

REPLICA_EVENTS: dict[type, str] = {
    schema.ReplicaStarting: "starting",
    schema.ReplicaReady: "ready",
    schema.ReplicaReported: "reported",
    schema.ReplicaDraining: "draining",
    schema.ReplicaStopped: "stopped",
    schema.ReplicaLost: "lost",
}


class Row(msgspec.Struct):
    table: ClassVar[str]


class RequestRow(Row):
    """One request. Open ones change until they end."""

    table = "ended_requests"

    request_id: str
    account: str
    key: str
    model: str
    kind: str
    plan: str
    price_version: int
    stream: bool
    group_id: str | None
    choice: int
    allowance: str | None
    client_request_id: str | None
    traceparent: str | None
    tracestate: str | None
    admission_ns: int | None
    accepted_at_ns: int
    accepted_sequence: int
    accepted_position: str
    state: str = "queued"
    finish_reason: str | None = None
    ended_by: str | None = None
    cancel_reason: str | None = None
    error_code: str | None = None
    simulated: bool = False
    finish_differs: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    attempts: int = 0
    deaths: int = 0
    events: int = 0
    billed_prompt_tokens: int = 0
    billed_cached_tokens: int = 0
    billed_output_tokens: int = 0
    charge_nanousd: int = 0
    itl_counts: list[int] | None = None
    started_at_ns: int | None = None
    first_token_at_ns: int | None = None
    last_token_at_ns: int | None = None
    finished_at_ns: int | None = None
    finished_sequence: int | None = None
    finished_index: int | None = None
    finished_position: str | None = None


class AttemptRow(Row):
    """One counted attempt. `last_event_at_ns` is the time of its own last event that counted."""

    table = "ended_attempts"

    attempt_id: str
    request_id: str
    model: str
    number: int
    worker: str
    engine: str
    model_digest: str
    simulated: bool
    resume_index: int
    started_at_ns: int
    last_event_at_ns: int
    started_position: str
    outcome: str = "running"
    cached_tokens: int = 0
    output_tokens: int = 0
    first_token_at_ns: int | None = None
    ended_at_ns: int | None = None


class ReplicaRow(Row, kw_only=True):
    """One event of one replica; fields that the event does not have are null. `ordered_at_ns` of a start is
    the time of the decision that it follows, by `events.fleet`."""

    table = "replica_events"

    replica: str
    model: str
    event: str
    engine: str | None = None
    hardware: str | None = None
    gpus: int | None = None
    hour_nanousd: int | None = None
    slots: int | None = None
    start_ns: int | None = None
    context_tokens: int | None = None
    running: int | None = None
    waiting: int | None = None
    kv_used_tokens: int | None = None
    why: str | None = None
    lived_ns: int | None = None
    ordered_at_ns: int | None = None
    position: str
    at_ns: int


class DecisionRow(Row):
    """One scaling decision; `positions` and `inputs` are JSON objects of integers. `events.fleet` defines
    `counts`."""

    table = "scale_decisions"

    model: str
    from_replicas: int
    to_replicas: int
    reason: str
    policy: str
    positions: str
    inputs: str
    epoch: int
    counts: bool
    decided_at_ns: int
    plan: int
    position: str
    at_ns: int


class PlanRow(Row):
    """One plan of a floor; `positions`, `inputs`, `candidates` and `restarts` are JSON. It counts if its
    epoch is the last."""

    table = "scale_plans"

    model: str
    floor: int
    restart: int
    is_missed: bool
    policy: str
    positions: str
    inputs: str
    candidates: str
    restarts: str
    requests: int
    sha256: str
    from_ns: int
    planned_at_ns: int
    epoch: int
    counts: bool
    position: str
    at_ns: int


class ElectionRow(Row):
    """A candidacy for leader; `counts` is true if it succeeded."""

    table = "held_elections"

    epoch: int
    control: str
    counts: bool
    position: str
    at_ns: int


class RefusalRow(Row):
    """One count of a gateway's report of refused requests."""

    table = "counted_refusals"

    gateway: str
    shard: int
    from_at_ns: int
    to_at_ns: int
    account: str | None
    reason: str
    count: int
    position: str
    at_ns: int


class BookRow(Row):
    """One event of the book that counts, the first with its id."""

    table = "book_entries"

    id: str
    event: str
    position: str
    at_ns: int


class AccountRow(Row):
    table = "opened_accounts"

    account: str
    position: str
    at_ns: int


class KeyRow(Row):
    """One issued key, without its hash."""

    table = "issued_keys"

    key: str
    account: str
    scopes: list[str]
    models: list[str] | None
    expires_at_ns: int | None
    position: str
    at_ns: int


class RevocationRow(Row):
    table = "revoked_keys"

    key: str
    account: str
    position: str
    at_ns: int


class PriceRow(Row):
    """One model's price in one version of the price list, nano-USD a token."""

    table = "published_prices"

    version: int
    model: str
    prompt_nanousd: int
    output_nanousd: int
    cached_prompt_nanousd: int | None
    second_nanousd: int | None
    position: str
    at_ns: int


class LimitsRow(Row):
    """All limits of an account or of a key."""

    table = "set_limits"

    account: str
    key: str | None
    plan: str | None
    budget_nanousd: int | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrent: int | None
    queue_share_percent: int | None
    position: str
    at_ns: int


class GrantRow(Row):
    table = "granted_credits"

    account: str
    nanousd: int
    reason: str
    position: str
    at_ns: int


class HoldRow(Row):
    """An allowance of one gateway's lane; requests refer to it by `id`."""

    table = "held_credits"

    id: str
    account: str
    shard: int
    lane: str
    nanousd: int
    position: str
    at_ns: int


class SettlementRow(Row):
    """The spent part of an allowance."""

    table = "settled_credits"

    account: str
    hold: str
    nanousd: int
    position: str
    at_ns: int


class CorrectionRow(Row):
    table = "corrections"

    account: str
    model: str
    request_id: str | None
    nanousd: int
    reason: str
    position: str
    sequence: int
    event_index: int
    at_ns: int


class PeriodRow(Row):
    """A closed period; `positions` and `roots` are JSON objects by stream."""

    table = "closed_periods"

    period: str
    positions: str
    roots: str
    digest: str
    rules: int
    position: str
    at_ns: int


class PeriodStreamRow(Row):
    """The last sequence of a stream that belongs to a closed period."""

    table = "closed_streams"

    period: str
    stream: str
    sequence: int


class SegmentRow(Row):
    """A sealed segment of the archive, and its manifest's SHA-256."""

    table = "sealed_segments"

    stream: str
    first_sequence: int
    last_sequence: int
    manifest: str
    position: str
    at_ns: int


class QuarantineRow(Row):
    """A record that is skipped."""

    table = "quarantined_records"

    stream: str
    sequence: int
    reason: str
    position: str
    at_ns: int


FACTS: tuple[type[Row], ...] = (
    RequestRow,
    AttemptRow,
    ReplicaRow,
    DecisionRow,
    PlanRow,
    ElectionRow,
    RefusalRow,
    BookRow,
    AccountRow,
    KeyRow,
    RevocationRow,
    PriceRow,
    LimitsRow,
    GrantRow,
    HoldRow,
    SettlementRow,
    CorrectionRow,
    PeriodRow,
    PeriodStreamRow,
    SegmentRow,
    QuarantineRow,
)
