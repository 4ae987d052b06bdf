"""Where each event is stored, and how a publisher repeats, compares and fails."""

from pathlib import Path
from typing import get_args

import msgspec
import pytest

from events import codec, ids, subjects
from events.contracts import SECOND_NS
from events.log import Conflict, Log, LogError
from events.publisher import Publisher, destination
from events.schema import AnyEvent, LaneReported, PeriodClosed, ReplicaDraining
from events.subjects import Address

pytestmark = pytest.mark.anyio

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))
AT = Address(3, "laneaaaa", "tiny-1")
REQUEST = ids.new_request_id(secret=b"s", account="acme", at=AT, floor=1, entropy=b"e" * ids.RANDOM_BYTES)

EXPECTED = {
    "RequestAccepted": ("RIFT_3", "rift.3.request.laneaaaa.tiny-1"),
    "AttemptStarted": ("RIFT_3", "rift.3.work.laneaaaa.tiny-1"),
    "TokensGenerated": ("RIFT_3", "rift.3.work.laneaaaa.tiny-1"),
    "AttemptReleased": ("RIFT_3", "rift.3.work.laneaaaa.tiny-1"),
    "RequestFinished": ("RIFT_3", "rift.3.work.laneaaaa.tiny-1"),
    "CancelRequested": ("RIFT_3", "rift.3.cancel.laneaaaa.tiny-1"),
    "ClientAttached": ("RIFT_3", "rift.3.lane.laneaaaa"),
    "ContentErased": ("RIFT_3", "rift.3.lane.laneaaaa"),
    "ControlElected": ("RIFT_FLEET", "rift.fleet._leader"),
    "ScalePlanned": ("RIFT_FLEET", "rift.fleet.model-a"),
}
PREFIXES = {
    "LaneOpened": "rift.",
    "LaneReported": "rift.7.lane.",
    "LaneLost": "rift.7.lane.",
    "RequestsRefused": "rift.1.lane.",
    "AccountOpened": "rift.book.account.",
    "KeyIssued": "rift.book.key.",
    "KeyRevoked": "rift.book.key.",
    "LimitsSet": "rift.book.limits.",
    "KeyLimitsSet": "rift.book.keylimits.",
    "CreditGranted": "rift.book.credit.",
    "CreditHeld": "rift.book.credit.",
    "CreditSettled": "rift.book.credit.",
    "UsageCorrected": "rift.book.correction.",
    "PricePublished": "rift.book.price.list",
    "PeriodClosed": "rift.book.period.",
    "SegmentSealed": "rift.book.segment.rift_",
    "RecordQuarantined": "rift.book.quarantine.rift_",
    "ShardOpened": "rift.book.shard.list",
    "SigningKeyPublished": "rift.book.signer.",
}


def golden(path: Path) -> AnyEvent:
    """The event of a golden file, as one of REQUEST if it is a request's."""
    event = msgspec.json.decode(path.read_bytes(), type=AnyEvent)
    return msgspec.structs.replace(event, request=REQUEST) if hasattr(event, "request") else event


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_every_event_has_a_destination(path: Path) -> None:
    event = golden(path)
    name = type(event).__name__
    found = destination(event, at=AT, shard=7)
    assert codec.decode(codec.encode("w", [event]), found.subject)[1] == (event,)
    if name in EXPECTED and not name.startswith("Usage"):
        assert found == EXPECTED[name]
    elif name in PREFIXES:
        assert found.subject.startswith(PREFIXES[name])
        assert found.stream == ("RIFT_BOOK" if "book" in found.subject else f"RIFT_{found.subject[5]}")
    else:
        assert found == ("RIFT_FLEET", subjects.fleet(subjects.slug(event.model)))


def test_every_type_is_in_a_golden_file() -> None:
    assert {type(golden(path)) for path in GOLDEN} == set(get_args(AnyEvent))


class Scripted:
    """A log that fails its first appends with the given errors, and then stores."""

    def __init__(self, *failures: LogError) -> None:
        self.failures = list(failures)
        self.stored: list[tuple[str, str, bytes, int | None]] = []

    async def append(self, stream: str, subject: str, data: bytes, *, expect_last: int | None = None) -> int:
        if self.failures:
            raise self.failures.pop(0)
        self.stored.append((stream, subject, data, expect_last))
        return len(self.stored)


def publisher(log: object) -> Publisher:
    assert isinstance(log, Scripted)
    as_log: Log = log  # type: ignore[assignment]
    return Publisher(as_log, "test", shard=2)


async def test_publish_names_writer_and_shard() -> None:
    log = Scripted()
    assert await publisher(log).publish(LaneReported(lane="laneaaaa"), within_s=1) == 1
    stream, subject, data, expect_last = log.stored[0]
    assert (stream, subject, expect_last) == ("RIFT_2", "rift.2.lane.laneaaaa", None)
    assert codec.decode(data) == ("test", (LaneReported(lane="laneaaaa"),))


async def test_publish_at_compares() -> None:
    event = PeriodClosed(
        id="period.2026-01", period="2026-01", positions={"RIFT_0": SECOND_NS}, roots={}, digest="0" * 64
    )
    log = Scripted(Conflict("taken"))
    with pytest.raises(Conflict):
        await publisher(log).publish_at(event, expect_last=0)
    await publisher(log).publish_at(event, expect_last=4)
    assert log.stored[0][3] == 4


async def test_try_publish_reports_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    log = Scripted(LogError("away"))
    event = ReplicaDraining(replica="r", model="tiny:1")
    assert not await publisher(log).try_publish(event, within_s=1)
    assert "an event ReplicaDraining could not be stored: away" in caplog.text
    assert await publisher(log).try_publish(event, within_s=1)
    assert log.stored[0][1] == "rift.fleet.tiny-1"
