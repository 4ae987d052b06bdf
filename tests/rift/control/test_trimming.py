"""The archiver over the log in memory: which segments may be trimmed."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from events import memory
from events.contracts import SECOND_NS
from events.log import Stored
from events.subjects import BOOK
from replay.archive.manifest import ArchiveError
from rift.control.duties import archiver as archivers
from tests.rift.control.archives import SEGMENT, SHARD, START_NS, WORK, Manifest, Rig, note

pytestmark = pytest.mark.anyio

DAY_NS = 24 * 3600 * SECOND_NS


# --- trimming --------------------------------------------------------------------------------------------


async def aged(rig: Rig) -> None:
    """Six segments; all but the last are older than seven days."""
    await rig.fill(3 * SEGMENT)
    await rig.fill(2 * SEGMENT, apart_ns=0)
    rig.clock[0] += 7 * DAY_NS
    await rig.fill(SEGMENT, apart_ns=0)


async def test_segments_past_the_retention_are_trimmed(rig: Rig) -> None:
    await rig.fill(2 * SEGMENT)
    await rig.fill(1, apart_ns=7 * DAY_NS - SECOND_NS)
    await rig.fill(SEGMENT - 1, apart_ns=0)
    await rig.run(rig.archiver())
    assert rig.shelf.lasts() == [10, 20, 30]
    assert rig.first == 11, "the second is a second short of it"
    await rig.fill(SEGMENT)
    await rig.run(rig.archiver())
    assert rig.first == 21
    assert (await rig.log.last_sequence(SHARD)) == 40


async def test_without_a_retention_the_last_minutes_are_kept(rig: Rig) -> None:
    await rig.fill(10 * SEGMENT)
    await rig.run(rig.archiver(retention_days=0))
    assert rig.first == 41, "60 of 100 seconds"


async def test_the_retention_uses_the_brokers_clock_alone(rig: Rig) -> None:
    await rig.fill(3 * SEGMENT)
    rig.clock[0] += 100 * DAY_NS
    await rig.run(rig.archiver())
    assert rig.first == 1, "nothing newer is archived"


async def test_the_book_is_never_trimmed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archivers, "SEGMENT_AGE_S", 0.0)
    for name in ("a", "b", "c"):
        await note(rig, name)
        rig.clock[0] += 100 * DAY_NS
        await rig.run(rig.archiver(retention_days=0))
    assert len(rig.shelf.lasts(BOOK)) == 3
    assert rig.broker.streams[BOOK].first == 1


async def test_an_unprojected_segment_is_not_trimmed(rig: Rig) -> None:
    """Where the database is behind the archive: it is being built again."""
    await aged(rig)
    await rig.archiver().archive_now()
    for projected, first in ((0, 1), (19, 11), (29, 21), (60, 51)):
        rig.projected = {SHARD: projected}
        await rig.run(rig.archiver())
        assert rig.first == first


async def test_an_open_request_holds_the_trim(rig: Rig) -> None:
    await aged(rig)
    for open_at, first in ((1, 1), (20, 11), (21, 21), (22, 21), (61, 51)):
        rig.open[SHARD] = open_at
        await rig.run(rig.archiver())
        assert rig.first == first, open_at


async def test_unarchived_records_are_not_trimmed(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await aged(rig)
    rig.shelf.failing = [OSError(28, "No space left on device")] * 100
    await rig.run(rig.archiver())
    assert rig.first == 1
    # The log has room for nothing more, and still.
    rig.broker.is_full = True
    await rig.run(rig.archiver())
    assert rig.first == 1


@pytest.mark.parametrize("lost", [0, 1, 2])
async def test_an_archive_that_lost_a_segment_is_not_trusted(
    rig: Rig, caplog: pytest.LogCaptureFixture, lost: int
) -> None:
    await aged(rig)
    rig.open[SHARD] = 1
    archiver = rig.archiver()
    await archiver.archive_now()
    rig.open.clear()
    del rig.shelf.held[SHARD][lost]
    await rig.run(archiver)
    assert rig.first == 1
    assert f"the archive lacks {lost * 10 + 1} to {lost * 10 + 10}" in caplog.text


async def test_a_segment_whose_files_are_damaged_is_not_trimmed(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    await aged(rig)
    rig.open[SHARD] = 1
    archiver = rig.archiver()
    await archiver.archive_now()
    rig.open.clear()
    rig.shelf.damaged[rig.shelf.lasts()[0]] = ["x.events.parquet is not as it was sealed"]
    await rig.run(archiver)
    assert rig.first == 1
    assert "x.events.parquet is not as it was sealed; put the file back" in caplog.text


async def test_an_emptied_archive_is_not_trusted(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await aged(rig)
    rig.open[SHARD] = 1
    archiver = rig.archiver()
    await archiver.archive_now()
    rig.open.clear()
    rig.shelf.held.clear()
    await rig.run(archiver)
    assert rig.first == 1
    await rig.run(rig.archiver())
    assert rig.first == 1
    assert "the book anchors RIFT_0 51 to 60 under manifest" in caplog.text
    assert rig.shelf.held == {}, "nothing else is archived"


async def test_an_archive_of_another_log_is_not_trusted(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.shelf.held[SHARD] = [Manifest(1, 100, START_NS, "a" * 64)]
    await aged(rig)
    await rig.run(rig.archiver())
    assert rig.first == 1
    assert "the archive holds RIFT_0 up to 100, but the log ends at 60" in caplog.text
    with pytest.raises(ArchiveError, match="RIFT_0"):
        await rig.archiver().archive_now()
    # As long as that one by now, and still another.
    rig.shelf.held[SHARD] = [Manifest(1, 60, START_NS - 1, "a" * 64)]
    await rig.run(rig.archiver())
    assert rig.first == 1
    assert rig.anchors() == []
    assert "the archive's segment 1 to 60 of RIFT_0 is older than the log's records" in caplog.text


async def test_a_gap_between_archive_and_log_is_reported(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await rig.fill(3 * SEGMENT)
    await rig.log.trim(SHARD, 5)
    await rig.run(rig.archiver())
    assert rig.shelf.lasts() == []
    assert "the archive holds RIFT_0 up to 0, but the log begins at 6" in caplog.text


async def test_a_segment_with_missing_records_is_not_archived(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    archiver = rig.archiver()
    await rig.fill(SEGMENT)
    await rig.run(archiver)
    await rig.fill(SEGMENT)
    await rig.log.trim(SHARD, 15)
    with pytest.raises(ArchiveError, match="does not hold every record from 11 to 20"):
        await archiver.archive_now()
    assert rig.shelf.lasts() == [10]


async def test_a_quarantined_record_that_the_log_has_lost_is_archived_as_an_empty_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise nothing after it would be archived or trimmed for ever."""
    await rig.fill(2 * SEGMENT)
    scan = rig.log.scan

    async def lossy(*args: Any, **more: Any) -> AsyncIterator[Sequence[Stored]]:
        async for batch in scan(*args, **more):
            yield [stored for stored in batch if stored.sequence not in (4, 5, 11)]

    monkeypatch.setattr(rig.log, "scan", lossy)
    rig.skipped = (4, 5)
    with pytest.raises(ArchiveError, match="does not hold every record from 11 to 20"):
        await rig.archiver().archive_now()
    rig.skipped = (4, 5, 11)
    await rig.archiver().archive_now()
    assert rig.shelf.lasts() == [10, 20]
    records = rig.shelf.records[SHARD]
    assert [stored.sequence for stored in records] == list(range(1, 21))
    assert [stored.sequence for stored in records if not stored.data] == [4, 5, 11]


# --- a log that runs out of room ---------------------------------------------------------------------------


async def crowd(rig: Rig, many: int) -> None:
    """So many seconds of traffic, and a stream for a hundred of them."""
    rig.broker.streams[SHARD].bytes_max = 100 * memory.broker.size_bytes(WORK, b"x" * 100)
    await rig.fill(many, data=b"x" * 100)


async def test_content_is_removed_early_when_room_runs_out(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    await crowd(rig, 74)
    archiver = rig.archiver()
    await rig.run(archiver)
    assert rig.first == 1
    assert caplog.messages == []
    await rig.fill(16, data=b"x" * 100)
    await rig.run(archiver)
    assert rig.first == 21, "as little as it takes"
    assert "RIFT_0 is running out of room: its prompts and answers up to 20 are removed" in caplog.text


async def test_nothing_that_is_needed_is_removed_early(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    await crowd(rig, 90)
    rig.open[SHARD] = 15
    archiver = rig.archiver()
    await rig.run(archiver)
    assert rig.first == 11
    await rig.run(rig.archiver())
    assert rig.first == 11
    assert (
        "RIFT_0 is running out of room, and nothing can be removed: it begins at 11, is archived "
        "up to 90, projected up to 90, needed from 15"
    ) in caplog.text


async def test_the_last_minutes_are_kept_even_then(rig: Rig) -> None:
    await crowd(rig, 0)
    await rig.fill(90, apart_ns=SECOND_NS // 2, data=b"x" * 100)
    await rig.run(rig.archiver())
    assert rig.first == 1


async def test_a_full_log_is_archived_even_if_few_records_wait(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archivers, "SEGMENT_RECORDS", 1000)
    await crowd(rig, 90)
    await rig.run(rig.archiver())
    assert rig.shelf.lasts() == [90]
