"""The one way to append an event: its type determines its stream and subject."""

import logging
from typing import Any, NamedTuple

from events import codec, subjects
from events.ids import parsed
from events.log import Log, LogError, append_until_known
from events.schema import (
    AccountOpened,
    AnyEvent,
    AttemptReleased,
    AttemptStarted,
    BookEvent,
    CancelRequested,
    ClientAttached,
    ContentErased,
    ControlElected,
    CreditGranted,
    CreditHeld,
    CreditSettled,
    KeyIssued,
    KeyLimitsSet,
    KeyRevoked,
    LaneLost,
    LaneOpened,
    LaneReported,
    LimitsSet,
    PeriodClosed,
    PricePublished,
    RecordQuarantined,
    RequestAccepted,
    RequestFinished,
    RequestsRefused,
    SegmentSealed,
    ShardOpened,
    SigningKeyPublished,
    TokensGenerated,
    UsageCorrected,
)
from events.subjects import Address

logger = logging.getLogger(__name__)


class Destination(NamedTuple):
    stream: str
    subject: str


def destination(event: AnyEvent, *, at: Address | None = None, shard: int = 0) -> Destination:
    """Return where an event is stored.

    `at` is the request's address, for events that name only their attempt; `shard` is the lane's, for lane
    events that do not name it.
    """
    match event:
        case RequestAccepted() | CancelRequested() | ClientAttached() | AttemptStarted() | RequestFinished():
            return _of_request(event, parsed(event.request).at)
        case ContentErased():
            return _of_request(event, parsed(event.request).at)
        case TokensGenerated() | AttemptReleased():
            assert at is not None, f"{type(event).__name__} names no request: pass its address"
            return _of_request(event, at)
        case LaneOpened() | RequestsRefused():
            return Destination(subjects.shard_stream(event.shard), subjects.lane(event.shard, event.lane))
        case LaneReported() | LaneLost():
            return Destination(subjects.shard_stream(shard), subjects.lane(shard, event.lane))
        case ControlElected():
            return Destination(subjects.FLEET, subjects.LEADER)
        case BookEvent():
            return Destination(subjects.BOOK, subjects.book(*_book_entry(event)))
    return Destination(subjects.FLEET, subjects.fleet(subjects.slug(event.model)))


def _of_request(event: Any, at: Address) -> Destination:
    stream = subjects.shard_stream(at.shard)
    match event:
        case RequestAccepted():
            return Destination(stream, subjects.request(at))
        case CancelRequested():
            return Destination(stream, subjects.cancel(at))
        case ClientAttached() | ContentErased():
            return Destination(stream, subjects.lane(at.shard, at.lane))
    return Destination(stream, subjects.work(at))


def _book_entry(event: BookEvent) -> tuple[str, str]:
    """Return the kind and the entry that a book event's subject names."""
    match event:
        case AccountOpened():
            return "account", event.account
        case KeyIssued() | KeyRevoked():
            return "key", event.key
        case LimitsSet():
            return "limits", event.account
        case KeyLimitsSet():
            return "keylimits", event.key
        case CreditGranted() | CreditHeld() | CreditSettled():
            # One subject for all of an account's credit: the compare-and-set covers grants too.
            return "credit", event.account
        case UsageCorrected():
            return "correction", event.account
        case PricePublished():
            return "price", "list"
        case PeriodClosed():
            return "period", event.period
        case SegmentSealed():
            return "segment", event.stream.lower()
        case ShardOpened():
            # One subject, so that a compare-and-set keeps the numbers without gaps.
            return "shard", "list"
        case SigningKeyPublished():
            return "signer", event.key[:16]
        case RecordQuarantined():
            return "quarantine", event.stream.lower()
    raise AssertionError(f"{type(event).__name__} has no subject: give it one here")


class Publisher:
    """Append events on behalf of one writer. `shard` is that of the writer's lane, or of its duty."""

    def __init__(self, log: Log, writer: str, *, shard: int = 0) -> None:
        self._log = log
        self._writer = writer
        self._shard = shard

    async def publish(self, event: AnyEvent, *, within_s: float, at: Address | None = None) -> int:
        """Append an event, repeating the identical record until its outcome is known.

        `at` is as in `destination`. Returns its sequence. Raises OutcomeUnknown after `within_s`, LogFull,
        RecordTooLarge.
        """
        stream, subject = destination(event, at=at, shard=self._shard)
        data = codec.encode(self._writer, [event])
        return await append_until_known(self._log, stream, subject, data, within_s=within_s)

    async def publish_at(self, event: AnyEvent, *, expect_last: int) -> int:
        """Append an event once, if `expect_last` is the last sequence of its subject (0: none).

        Returns its sequence. Raises Conflict if another record came first; OutcomeUnknown, LogFull.
        """
        stream, subject = destination(event, shard=self._shard)
        data = codec.encode(self._writer, [event])
        return await self._log.append(stream, subject, data, expect_last=expect_last)

    async def try_publish(self, event: AnyEvent, *, within_s: float) -> bool:
        """As `publish`, but log the failure as a warning and return False."""
        try:
            await self.publish(event, within_s=within_s)
        except LogError as error:
            logger.warning("an event %s could not be stored: %s", type(event).__name__, error)
            return False
        return True
