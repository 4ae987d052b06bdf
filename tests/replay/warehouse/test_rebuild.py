"""The rebuild from the archive gives the same rows as the fold."""

import random
import shutil
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events import codec, subjects
from events.log import Stored
from events.schema import (
    AttemptReleased,
    CancelRequested,
    ClientAttached,
    LaneReported,
    Price,
    PricePublished,
    Problem,
    RefusalCount,
    RequestFinished,
    RequestsRefused,
)
from events.subjects import Address
from replay.archive.archive import Archive
from replay.archive.manifest import ArchiveDamaged
from replay.facts.fold import Batch, BookBehind
from replay.warehouse import rebuild as rebuilding
from replay.warehouse.fact_tables import FactTables
from replay.warehouse.rebuild import rebuild
from replay.warehouse.warehouse import ProjectionStopped, Warehouse, WarehouseError
from tests.replay.archive.test_archive import KEY, anchor, seal_all
from tests.replay.conftest import TRACEPARENT, started, tokens_of
from tests.replay.facts.test_fold import apply_all, everything

Streams = dict[str, list[Stored]]


def assert_the_same(streams: Streams, archived: dict[str, int], folder: Path, dice: random.Random) -> None:
    """Archive a prefix of each stream, rebuild, apply the rest, and compare with a fold of everything."""
    archive = Archive(folder / "archive", key=KEY)
    seal_all(archive, {s: messages[: archived[s]] for s, messages in streams.items()}, dice=dice)
    path = folder / "rebuilt.duckdb"
    rebuild(archive, path)
    again, whole = Warehouse.open(path), Warehouse.open(Path(":memory:"))
    try:
        assert again.positions() == {stream: last for stream, last in archived.items() if last}
        apply_all(whole, {s: messages[: archived[s]] for s, messages in streams.items() if archived[s]})
        assert everything(again) == everything(whole)
        for warehouse in (again, whole):
            apply_all(warehouse, streams)
        assert everything(again) == everything(whole)
    finally:
        again.close()
        whole.close()


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_history(chaos: Any, tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    dice = random.Random(seed)
    history = chaos(dice)
    for _ in range(dice.randint(0, 3)):
        history.write(dice.randint(0, 30))
        for _ in range(dice.randint(0, 6)):
            history.scribe.finished_request(tokens=dice.randint(0, 4), price_version=history.versions)
    streams = history.write(5)
    archived = {stream: dice.randint(0, len(messages)) for stream, messages in streams.items()}
    archived[subjects.BOOK] = len(streams[subjects.BOOK])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuilding, "WINDOW_BYTES", dice.choice((1, 60_000, 10**9)))
        patch.setattr(rebuilding, "BATCH_EVENTS", dice.choice((1, 7, 10_000)))
        assert_the_same(streams, archived, tmp_path_factory.mktemp("any"), dice)


def rebuilt(streams: Streams, folder: Path, cuts: list[int]) -> tuple[Warehouse, list[int]]:
    """Rebuild from segments that end at `cuts`; also return the records that the fold processed."""
    archive = Archive(folder / "archive", key=KEY)
    seal_all(archive, {subjects.BOOK: streams[subjects.BOOK]})
    for last in cuts:
        archive.seal("RIFT_0", streams["RIFT_0"][archive.last("RIFT_0") : last], last=last)
    given: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuilding, "WINDOW_BYTES", 1)
        plain = rebuilding._fold_part

        def observed(tables: FactTables, batch: Batch) -> None:
            given.extend(record.stored.sequence for record in batch.records)
            plain(tables, batch)

        patch.setattr(rebuilding, "_fold_part", observed)
        rebuild(archive, folder / "rebuilt.duckdb")
    return Warehouse.open(folder / "rebuilt.duckdb"), given


def compare(streams: Streams, folder: Path, cuts: list[int]) -> list[int]:
    """Check that the rebuild gives the same rows, and return the records that the fold processed."""
    again, given = rebuilt(streams, folder, cuts)
    whole = Warehouse.open(Path(":memory:"))
    apply_all(whole, streams)
    assert everything(again) == everything(whole)
    again.close()
    whole.close()
    return given


def test_common_lives_never_meet_the_fold_wherever_segments_end(scribe: Any, tmp_path: Path) -> None:
    scribe.prices()
    scribe.finished_request(tokens=5)
    scribe.finished_request(tokens=0)
    first, second = (
        scribe.accept(plan="per_second", choice=2, traceparent=TRACEPARENT, admission_ns=9),
        scribe.accept(client_request_id='a"\\'),
    )
    scribe.tell(started(first, "a1"), started(second, "a2", simulated=False))
    scribe.tell(tokens_of("a1", 0, 3, cached_tokens=4), tokens_of("a2", 0))
    scribe.tell(tokens_of("a2", 1), tokens_of("a1", 3, 2), tokens_of("a1", 5), step_ns=700_000_000)
    ends = [
        RequestFinished(request=first, attempt="a1", reason="length", output_tokens=6, account="other"),
        RequestFinished(
            request=second,
            attempt="a2",
            reason="failed",
            output_tokens=2,
            error=Problem(code="odd", message="x"),
        ),
    ]
    scribe.tell(*ends)
    size = len(scribe.streams["RIFT_0"])
    for number, cuts in enumerate(([size], list(range(1, size + 1)), [3, 7, size - 1, size])):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert compare(scribe.streams, folder, cuts) == []


def started_as(attempt: str, **fields: Any) -> Any:
    return lambda request: started(request, attempt, **fields)


def ended_by(attempt: str | None, tokens: int, reason: Any = "stop") -> Any:
    return lambda request: RequestFinished(
        request=request, attempt=attempt, reason=reason, output_tokens=tokens
    )


def cancelled(request: str) -> CancelRequested:
    return CancelRequested(request=request, why="client")


# Events after the acceptance, one per record. Each history breaks one condition of the SQL.
ODD: dict[str, list[Any]] = {
    "ended by control": [ended_by(None, 0, "failed")],
    "another count": [started_as("a"), ended_by("a", 1)],
    "resumed from nothing": [started_as("b", resume_index=1), tokens_of("b", 1), ended_by("b", 2)],
    "resumed from a later token": [started_as("o", resume_index=1), tokens_of("o", 0), ended_by("o", 1)],
    "after nobody": [started_as("c", after="other"), ended_by("c", 0)],
    "a first token that is not": [started_as("d"), tokens_of("d", 1), ended_by("d", 1)],
    "a gap": [started_as("e"), tokens_of("e", 0), tokens_of("e", 2), ended_by("e", 2)],
    "tokens before the start": [tokens_of("f", 0), started_as("f"), ended_by("f", 1)],
    "tokens behind the end": [started_as("g"), ended_by("g", 1), tokens_of("g", 0)],
    "an end before the start": [ended_by("h", 0), started_as("h")],
    "released": [started_as("i"), AttemptReleased(attempt="i", why="host"), ended_by("i", 0)],
    "cancelled": [started_as("j"), cancelled, ended_by("j", 0)],
    "two attempts": [started_as("k"), started_as("l", after="k"), ended_by("l", 0)],
    "two ends": [started_as("m"), tokens_of("m", 0), ended_by("m", 1), ended_by("m", 1)],
    "an attempt of another": [started_as("n"), ended_by("n", 0)],
    "an attempt of the other": [started_as("n"), ended_by("n", 0)],
}


def test_each_odd_life_is_the_folds_and_no_other(scribe: Any, tmp_path: Path) -> None:
    scribe.prices()
    odd: list[int] = []

    def live(events: list[Any], **fields: Any) -> None:
        """Write an odd request, and a common one after it."""
        begin = len(scribe.streams.get("RIFT_0", ()))
        request = scribe.accept(**fields)
        for event in events:
            scribe.tell(event(request) if callable(event) else event)
        odd.extend(range(begin + 1, len(scribe.streams["RIFT_0"]) + 1))
        scribe.finished_request()

    for events in ODD.values():
        live(events)
    for attempt in ("x", "y"):
        live([started_as(attempt), tokens_of(attempt, 0), ended_by(attempt, 1)], group="g")
    live([started_as("z"), lambda request: scribe.accepted(request), ended_by("z", 0)])
    begin = len(scribe.streams["RIFT_0"])
    request = scribe.accept()
    scribe.tell(started(request, "elsewhere"))
    scribe.tell(tokens_of("elsewhere", 0), at=Address(0, "laneother", "tiny-1"))
    scribe.tell(RequestFinished(request=request, attempt="elsewhere", reason="stop", output_tokens=1))
    request = scribe.request_id()
    scribe.tell(started(request, "early"))
    scribe.tell(scribe.accepted(request), kind="request")
    scribe.tell(ended_by("early", 0)(request))
    odd.extend(range(begin + 1, begin + 8))
    given = compare(scribe.streams, tmp_path, [len(scribe.streams["RIFT_0"])])
    assert sorted(set(given)) == odd


def test_what_is_at_no_requests_address_is_nobodys(scribe: Any, tmp_path: Path) -> None:
    scribe.prices()
    request = scribe.finished_request()
    other = Address(0, "laneaaab", "tiny-1")
    scribe.tell(scribe.accepted(scribe.request_id()), kind="request", at=other)
    scribe.tell(RequestFinished(request=request, attempt=None, reason="failed", output_tokens=0), at=other)
    scribe.tell(cancelled(request), at=other)
    elsewhere = scribe.request_id()
    scribe.tell(scribe.accepted(elsewhere), kind="request", at=other)
    scribe.tell(started(elsewhere, "elsewhere"), at=other)
    scribe.tell(ended_by("elsewhere", 0)(elsewhere), at=other)
    scribe.tell(scribe.accepted("req_0_laneaaaa_tiny-1_0_short_id"), kind="request")
    scribe.put("RIFT_0", "rift.0.lane.laneaaaa", codec.encode("g", [LaneReported(lane="laneaaaa")]))
    scribe.put("RIFT_0", "rift.0.lane.laneaaaa", codec.encode("g", [ClientAttached(request=request)]))
    assert compare(scribe.streams, tmp_path, [2, len(scribe.streams["RIFT_0"])]) == []


def test_reports_of_refused_requests_count_once_over_segments(scribe: Any, tmp_path: Path) -> None:
    def report(lane: str, minute: int, *, shard: int = 0) -> RequestsRefused:
        counts = (
            RefusalCount(reason="invalid_api_key", count=3),
            RefusalCount(account="dev", reason="queue_full", count=1 + minute),
        )
        times = {"from_at_ns": 60 * minute, "to_at_ns": 60 * minute + 60}
        return RequestsRefused(lane=lane, shard=shard, counts=counts, other=minute, **times)

    def put(*reports: RequestsRefused, lane: str = "laneaaaa") -> None:
        scribe.put("RIFT_0", f"rift.0.lane.{lane}", codec.encode("g", reports))

    scribe.prices()
    put(report("laneaaaa", 0))
    scribe.finished_request()
    put(report("lanebbbb", 0), lane="lanebbbb")
    cut = len(scribe.streams["RIFT_0"])
    # Repeated, late, of another lane or shard; then a new one.
    put(report("laneaaaa", 0))
    put(report("laneaaaa", 1), report("laneaaaa", 0))
    put(report("lanebbbb", 1), report("laneaaaa", 2, shard=1))
    scribe.tell(report("laneaaaa", 4))
    put(report("laneaaaa", 3))
    size = len(scribe.streams["RIFT_0"])
    # The fold sees the reports only.
    assert len(compare(scribe.streams, tmp_path, [cut, size])) == size - cut + 2
    opened = Warehouse.open(Path(":memory:"))
    for last in (cut, size):
        apply_all(opened, {**scribe.streams, "RIFT_0": scribe.streams["RIFT_0"][:last]})
        # The fold is restored from its rows.
        with pytest.raises(InterruptedError), opened.transaction():
            raise InterruptedError
    rows = opened.query("select gateway, from_at_ns // 60, account, reason, count from refusals").rows
    opened.close()
    assert sorted(map(repr, rows)) == sorted(
        repr([lane, minute, account, reason, count])
        for lane, minute in (("laneaaaa", 0), ("laneaaaa", 1), ("laneaaaa", 3), ("lanebbbb", 0))
        for account, reason, count in (
            (None, "invalid_api_key", 3),
            ("dev", "queue_full", 1 + minute),
            (None, "other", minute),
        )
        if count
    )


def test_an_acceptance_stored_again_in_a_later_segment_begins_nothing(scribe: Any, tmp_path: Path) -> None:
    """One request has ended, one is in the fold, and one waits."""
    scribe.prices()
    ended, odd, waiting = scribe.finished_request(), scribe.accept(), scribe.accept()
    scribe.tell(scribe.accepted(odd), kind="request")
    cut = len(scribe.streams["RIFT_0"])
    for number, request in enumerate((ended, odd, waiting)):
        scribe.tell(scribe.accepted(request), kind="request")
        scribe.tell(started(request, f"late-{number}"))
        scribe.tell(ended_by(f"late-{number}", 0)(request))
    compare(scribe.streams, tmp_path, [cut, len(scribe.streams["RIFT_0"])])


def test_odd_lives_over_the_end_of_a_segment(scribe: Any, tmp_path: Path) -> None:
    scribe.prices()
    released, early, ordinary, second = scribe.accept(), scribe.request_id(), scribe.accept(), scribe.accept()
    scribe.tell(started(released, "a"), AttemptReleased(attempt="a", why="host"), started(early, "b"))
    scribe.tell(scribe.accepted(early), kind="request")
    scribe.tell(started(ordinary, "c"), tokens_of("c", 0, 2), started(second, "d"), tokens_of("d", 0, 2))
    cut = len(scribe.streams["RIFT_0"])
    scribe.tell(ended_by("a", 0)(released), ended_by("b", 0)(early), tokens_of("c", 2), tokens_of("d", 3))
    scribe.tell(ended_by("c", 3)(ordinary), ended_by("d", 3)(second))
    compare(scribe.streams, tmp_path, [cut, len(scribe.streams["RIFT_0"])])


def test_prices_of_the_cached_and_of_what_is_too_large_for_64_bits(scribe: Any, tmp_path: Path) -> None:
    huge = 2**62
    scribe.book(
        PricePublished(
            id="p",
            version=1,
            prices=(
                Price(model="tiny:1", prompt_nanousd=huge, output_nanousd=huge, cached_prompt_nanousd=3),
                Price(model="other", prompt_nanousd=1, output_nanousd=1),
            ),
        )
    )
    for cached in (0, 4, 100):
        request, attempt = scribe.accept(), scribe.unique("att")
        scribe.tell(started(request, attempt))
        scribe.tell(tokens_of(attempt, 0, 5, cached_tokens=cached))
        scribe.tell(RequestFinished(request=request, attempt=attempt, reason="stop", output_tokens=5))
    assert compare(scribe.streams, tmp_path, [len(scribe.streams["RIFT_0"])]) == []


def test_a_request_that_cannot_be_priced_stops_it_where_it_stops_the_fold(
    scribe: Any, tmp_path: Path
) -> None:
    scribe.prices()
    scribe.finished_request()
    scribe.accept(price_version=2)
    scribe.finished_request()
    with pytest.raises(
        ProjectionStopped, match=r"RIFT_0:7: .* price version 2, which the book does not hold"
    ):
        rebuilt(scribe.streams, tmp_path, [len(scribe.streams["RIFT_0"])])
    assert not (tmp_path / "rebuilt.duckdb").exists()


def test_the_book_may_go_on_in_the_log(scribe: Any, tmp_path: Path) -> None:
    scribe.prices()
    scribe.prices(2)
    scribe.finished_request(price_version=2)
    archive = Archive(tmp_path / "archive", key=KEY)
    book = scribe.streams[subjects.BOOK]
    archive.seal(subjects.BOOK, book[:1], last=1)
    seal_all(archive, {"RIFT_0": scribe.streams["RIFT_0"]})
    path = tmp_path / "db"
    with pytest.raises(BookBehind):
        rebuild(archive, path)
    rebuild(archive, path, book=[book])
    with pytest.raises(BookBehind):
        rebuild(archive, tmp_path / "other", book=[book[:1]])
    opened = Warehouse.open(path)
    assert opened.positions() == {subjects.BOOK: 2, "RIFT_0": len(scribe.streams["RIFT_0"])}
    assert opened.query("select price_version, state from requests").rows == [[2, "finished"]]
    opened.close()


def test_a_request_of_a_later_book_waits_though_its_price_is_known(scribe: Any, tmp_path: Path) -> None:
    scribe.prices()
    scribe.finished_request(book=2)
    with pytest.raises(BookBehind):
        rebuilt(scribe.streams, tmp_path, [len(scribe.streams["RIFT_0"])])


def test_a_damaged_archive_makes_no_warehouse(scribe: Any, tmp_path: Path) -> None:
    scribe.prices()
    scribe.finished_request()
    archive = Archive(tmp_path / "archive", key=KEY)
    seal_all(archive, scribe.streams)
    damaged = archive.path(archive.manifests("RIFT_0")[0], "events")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(ArchiveDamaged, match=f"{damaged.name} is not as it was sealed"):
        rebuild(archive, tmp_path / "db")
    assert not (tmp_path / "db").exists()
    damaged.write_bytes(whole)
    rebuild(archive, tmp_path / "db")


def test_an_archive_that_the_book_does_not_name_makes_no_warehouse(scribe: Any, tmp_path: Path) -> None:
    scribe.prices()
    scribe.finished_request()
    scribe.finished_request()
    shard = scribe.streams["RIFT_0"]
    archive = Archive(tmp_path / "archive", key=KEY)
    for last in (6, 12):
        manifest = archive.seal("RIFT_0", shard[last - 6 : last], last=last)
        scribe.book(anchor(manifest))
    seal_all(archive, {subjects.BOOK: scribe.streams[subjects.BOOK]})
    rebuild(archive, tmp_path / "db")
    with pytest.raises(WarehouseError, match="db exists already"):
        rebuild(archive, tmp_path / "db")
    for path in (tmp_path / "archive" / "RIFT_0").glob("00000000000000000007.*"):
        path.unlink()
    with pytest.raises(ArchiveDamaged, match="the segment of 7 to 12 was sealed and is missing"):
        rebuild(archive, tmp_path / "less")
    archive.seal("RIFT_0", [*shard[6:11], Stored(shard[11].subject, 12, 2**62, shard[11].data)], last=12)
    with pytest.raises(ArchiveDamaged, match="the manifest of 7 to 12 is not the one that the book names"):
        rebuild(archive, tmp_path / "other")
    shutil.rmtree(tmp_path / "archive" / "RIFT_0")
    with pytest.raises(ArchiveDamaged, match="the segment of 1 to 6 was sealed and is missing"):
        rebuild(archive, tmp_path / "none")
    assert not [name for name in ("less", "other", "none") if (tmp_path / name).exists()]


def test_its_sql_reads_the_archive_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for folder in ("in", "."):
        (tmp_path / folder / "x.csv").write_text("a\n1\n")
    opened = Warehouse.open(tmp_path / "db", reading=tmp_path / "in")
    [answer] = opened.read((f"from read_csv('{tmp_path}/in/x.csv')", []))
    assert answer.rows == [[1]]
    for question in (f"from read_csv('{tmp_path}/x.csv')", f"from read_csv('{tmp_path}/in/../x.csv')"):
        with pytest.raises(duckdb.PermissionException, match="disabled by configuration"):
            opened.read((question, []))
    opened.close()
