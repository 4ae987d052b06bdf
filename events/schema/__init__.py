"""Every event of the log, and the record that carries them.

Events are facts in the past tense: frozen, tagged by their class name, never edited once released.
A schema only grows: a new field has a default, a removed one stays. The golden files in
`tests/events/golden/` hold every version that was ever written.

Only types live here: rules are in `lifecycle.py`, bytes in `codec.py`, subjects in `subjects.py`.

    request  a request, its attempts and its lane
    fleet    replicas, elections, scaling decisions
    book     accounts, keys, prices, credit, closed periods
    shapes   types that the others share
"""

from events.schema.book import (
    AccountOpened,
    BookEvent,
    CreditGranted,
    CreditHeld,
    CreditSettled,
    KeyIssued,
    KeyLimitsSet,
    KeyRevoked,
    Limits,
    LimitsSet,
    PeriodClosed,
    Price,
    PricePublished,
    RecordQuarantined,
    SegmentSealed,
    ShardOpened,
    SigningKeyPublished,
    UsageCorrected,
)
from events.schema.fleet import (
    ControlElected,
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
    ReplicaReported,
    ReplicaStarting,
    ReplicaStopped,
    ScaleDecided,
    ScalePlanned,
)
from events.schema.request import (
    AttemptReleased,
    AttemptStarted,
    CancelRequested,
    ClientAttached,
    ContentErased,
    LaneLost,
    LaneOpened,
    LaneReported,
    Logprob,
    Message,
    Parameters,
    Problem,
    RefusalCount,
    RequestAccepted,
    RequestFinished,
    RequestsRefused,
    ResponseFormat,
    Stamps,
    TokensGenerated,
    Tool,
    ToolCall,
    ToolCallDelta,
)
from events.schema.shapes import (
    Account,
    Amount,
    CancelReason,
    Digest,
    Event,
    FinishReason,
    Kind,
    Natural,
    Period,
    Plan,
    ReleaseReason,
    Shape,
)

__all__ = [
    "RECORD_VERSION",
    "Account",
    "AccountOpened",
    "Amount",
    "AnyEvent",
    "AttemptReleased",
    "AttemptStarted",
    "BookEvent",
    "BookEvents",
    "CancelReason",
    "CancelRequested",
    "ClientAttached",
    "ContentErased",
    "ControlElected",
    "CreditGranted",
    "CreditHeld",
    "CreditSettled",
    "Digest",
    "Event",
    "FinishReason",
    "FleetEvent",
    "KeyIssued",
    "KeyLimitsSet",
    "KeyRevoked",
    "Kind",
    "LaneEvent",
    "LaneLost",
    "LaneOpened",
    "LaneReported",
    "Limits",
    "LimitsSet",
    "Logprob",
    "Message",
    "Natural",
    "Parameters",
    "Period",
    "PeriodClosed",
    "Plan",
    "Price",
    "PricePublished",
    "Problem",
    "Record",
    "RecordQuarantined",
    "RefusalCount",
    "ReleaseReason",
    "ReplicaDraining",
    "ReplicaLost",
    "ReplicaReady",
    "ReplicaReported",
    "ReplicaStarting",
    "ReplicaStopped",
    "RequestAccepted",
    "RequestEvent",
    "RequestFinished",
    "RequestsRefused",
    "ResponseFormat",
    "ScaleDecided",
    "ScalePlanned",
    "SegmentSealed",
    "Shape",
    "ShardOpened",
    "SigningKeyPublished",
    "Stamps",
    "TokensGenerated",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "UsageCorrected",
]

RECORD_VERSION = 1

RequestEvent = (
    RequestAccepted | AttemptStarted | TokensGenerated | AttemptReleased | RequestFinished | CancelRequested
)
LaneEvent = LaneOpened | LaneReported | LaneLost | ClientAttached | ContentErased | RequestsRefused
FleetEvent = (
    ControlElected
    | ScaleDecided
    | ScalePlanned
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
    | KeyLimitsSet
    | CreditGranted
    | CreditHeld
    | CreditSettled
    | UsageCorrected
    | PeriodClosed
    | SegmentSealed
    | ShardOpened
    | SigningKeyPublished
    | RecordQuarantined
)
AnyEvent = RequestEvent | LaneEvent | FleetEvent | BookEvents


class Record(Shape, frozen=True, kw_only=True, omit_defaults=False):
    """One message of the log: events of one writer, in order."""

    version: int = RECORD_VERSION
    writer: str
    events: tuple[AnyEvent, ...]
