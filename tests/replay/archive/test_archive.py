"""The archive: it returns the sealed records, stores no content, and detects all damage."""

import hashlib
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import duckdb
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events import codec, merkle, redaction, schema, subjects
from events.log import Stored
from events.publisher import destination
from events.schema import SegmentSealed
from replay.archive import archive as archives
from replay.archive import parquet
from replay.archive.archive import Archive
from replay.archive.manifest import ArchiveDamaged, ArchiveError, File, Manifest, file_name
from replay.facts.fold import Batch
from replay.warehouse.warehouse import Warehouse
from tests.events.test_publisher import AT, GOLDEN, golden
from tests.replay.facts.test_fold import apply_all, everything

KEY = b"k" * 32
Streams = dict[str, list[Stored]]


def seal_all(archive: Archive, streams: Streams, *, dice: random.Random | None = None) -> None:
    """Seal everything, cut by the dice."""
    for stream, messages in streams.items():
        while (done := archive.last(stream)) < len(messages):
            last = dice.randint(done + 1, len(messages)) if dice else len(messages)
            archive.seal(stream, messages[done:last], last=last)


def folded(archive: Archive) -> Warehouse:
    warehouse = Warehouse.open(Path(":memory:"))
    for stream in sorted(archive.streams(), key=lambda name: name != subjects.BOOK):
        for records in archive.records(stream):
            warehouse.apply_batch(Batch(stream, records))
    return warehouse


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def anchors(archive: Archive) -> dict[str, list[SegmentSealed]]:
    return {
        stream: [anchor(manifest) for manifest in archive.manifests(stream)] for stream in archive.streams()
    }


def anchor(manifest: Manifest) -> SegmentSealed:
    sealed = manifest.sha256
    return SegmentSealed(
        id=sealed, stream=manifest.stream, first=manifest.first, last=manifest.last, manifest=sealed
    )


@pytest.fixture
def archive(tmp_path: Path, chaos: Any) -> Archive:
    """Three segments of a shard, and a book."""
    made = Archive(tmp_path / "archive", key=KEY)
    streams = chaos(random.Random(3)).write(60)
    for last in (20, 21, 60):
        made.seal("RIFT_0", streams["RIFT_0"][made.last("RIFT_0") : last], last=last)
    seal_all(made, streams)
    assert [(m.first, m.last, m.records) for m in made.manifests("RIFT_0")][:3] == [
        (1, 20, 20),
        (21, 21, 1),
        (22, 60, 39),
    ]
    return made


def select(path: Path, columns: str = "*", rest: str = "") -> list[tuple[Any, ...]]:
    return duckdb.execute(f"select {columns} from read_parquet(?) {rest}", [str(path)]).fetchall()


# --- what it gives back --------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_fold_over_the_archive_equals_that_over_the_log(
    chaos: Any, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    dice = random.Random(seed)
    streams = chaos(dice).write(40)
    archive = Archive(tmp_path_factory.mktemp("cuts"), key=KEY)
    seal_all(archive, streams, dice=dice)
    assert list(archive.verify(anchors=anchors(archive))) == []
    whole = Warehouse.open(Path(":memory:"))
    apply_all(whole, streams)
    again = folded(archive)
    assert everything(again) == everything(whole)
    whole.close()
    again.close()


def test_records_come_back_bare_and_in_order(archive: Archive, chaos: Any) -> None:
    streams = chaos(random.Random(3)).write(60)
    now_ns, expected = 0, []
    for stored in streams["RIFT_0"]:
        now_ns = max(now_ns, stored.stored_at_ns)
        events = [redaction.decode(redaction.split(event)[0]) for event in codec.decode(stored.data)[1]]
        expected.append((stored.sequence, now_ns, stored.subject, events))
    for first, last in ((1, None), (20, 22), (21, 21), (5, 30), (61, None), (1, 10**6)):
        records = [read for batch in archive.records("RIFT_0", first=first, last=last) for read in batch]
        in_range = [row for row in expected if first <= row[0] <= (last or 10**9)]
        assert [
            (r.stored.sequence, r.stored.stored_at_ns, r.stored.subject, r.events) for r in records
        ] == in_range


def test_records_come_in_batches_that_are_bounded(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replay.archive.archive.ROWS", 10)
    batches = list(archive.records("RIFT_0"))
    assert len(batches) > 5
    assert all(sum(len(read.events) for read in batch) < 20 for batch in batches)


def test_a_run_is_one_row_and_what_breaks_it_starts_another(scribe: Any, tmp_path: Path) -> None:
    def tokens(index: int, count: int = 1, attempt: str = "a", **fields: Any) -> schema.TokensGenerated:
        return schema.TokensGenerated(
            attempt=attempt, index=index, token_ids=(5,) * count, text="x", **fields
        )

    scribe.tell(tokens(0, 2, cached_tokens=3), tokens(0, attempt="b"))
    scribe.tell(tokens(2), tokens(3, 4))
    scribe.tell(tokens(7), kind="cancel")
    scribe.tell(tokens(8), tokens(10), tokens(0, attempt='"'), tokens(1, attempt='"'))
    scribe.tell(tokens(11, cached_tokens=1))
    archive = Archive(tmp_path, key=KEY)
    seal_all(archive, scribe.streams)
    path = archive.path(archive.manifests("RIFT_0")[0], "events")
    assert select(path, "attempt, token_index, tokens, indexes, json is null") == [
        ("a", 0, 7, [0, 2, 3], True),
        ("b", 0, 1, None, True),
        ("a", 7, 1, None, True),
        ("a", 8, 1, None, True),
        ("a", 10, 1, None, True),
        ('"', 0, 1, None, False),
        ('"', 1, 1, None, False),
        ("a", 11, 1, None, True),
    ]
    assert list(archive.verify()) == []


def test_every_event_of_the_golden_files_comes_back(tmp_path: Path) -> None:
    events = [golden(path) for path in GOLDEN]
    assert len(events) > 25
    archive = Archive(tmp_path, key=KEY)
    stored = [
        Stored(destination(event, at=AT).subject, n + 1, n, codec.encode('w"é', [event]))
        for n, event in enumerate(events)
    ]
    archive.seal("RIFT_0", stored, last=len(stored))
    [batch] = archive.records("RIFT_0")
    assert [read.events for read in batch] == [
        [redaction.decode(redaction.split(event)[0])] for event in events
    ]
    assert list(archive.verify()) == []
    rows = select(
        archive.path(archive.manifests("RIFT_0")[0], "events"), "distinct type", "where json is null"
    )
    event_types = {kind.__name__ for kind in get_args(schema.RequestEvent)}
    assert {kind for (kind,) in rows} == event_types, "these are many, and their columns say it all"


def test_a_manifest_says_what_its_files_hold(archive: Archive) -> None:
    *_, manifest = archive.manifests("RIFT_0")
    records = archive.path(manifest, "records")
    hashes = select(records, "hash", "order by sequence")
    assert manifest.root == merkle.root([bytes.fromhex(h) for (h,) in hashes]).hex()
    assert manifest.previous == archive.manifests("RIFT_0")[-2].sha256
    assert records.with_name(f"{manifest.first:020d}.json").read_bytes() == manifest.encoded
    assert manifest.encoded.startswith(b'{"version":1,"stream":"RIFT_0","first":22,"last":60,"at_ns":')


@pytest.mark.parametrize("name", ["", "a/b", "a\0b"])
def test_a_manifest_with_a_name_that_no_file_can_have_is_damaged(archive: Archive, name: str) -> None:
    *_, manifest = archive.manifests("RIFT_0")
    path = archive.folder / "RIFT_0" / file_name(manifest.first)
    whole = path.read_bytes()
    path.write_bytes(
        msgspec.structs.replace(manifest, files={name: next(iter(manifest.files.values()))}).encoded
    )
    with pytest.raises(ArchiveDamaged, match="which is no name"):
        archive.manifests("RIFT_0")
    path.write_bytes(whole)


def test_the_check_by_hand_of_the_docs_holds(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(archives.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    query = readme.partition("# The archive")[2].partition("```sql\n")[2].partition("```")[0]
    monkeypatch.chdir(archive.folder / "RIFT_BOOK")
    records = archive.manifests("RIFT_BOOK")[-1].last
    assert duckdb.execute(query).fetchall() == [(sequence + 1, True) for sequence in range(records)]


# --- what it never holds -------------------------------------------------------------------------


@pytest.mark.parametrize("content", [False, True])
def test_content_is_kept_only_if_wanted(content: bool, scribe: Any, canary: str, tmp_path: Path) -> None:
    scribe.prices()
    request = scribe.finished_request()
    problem = schema.Problem(code="c", message=canary)
    scribe.tell(
        schema.RequestFinished(request=request, attempt=None, reason="failed", output_tokens=0, error=problem)
    )
    archive = Archive(tmp_path, key=KEY, content=content)
    seal_all(archive, scribe.streams)
    assert list(archive.verify()) == []
    rows = [row for path in files(tmp_path) if path.suffix == ".parquet" for row in select(path)]
    content_files = [path.name for path in files(tmp_path) if "content" in path.name]
    assert len(content_files) == (2 if content else 0)
    assert (canary in repr(rows)) is content
    if content:
        path = archive.path(archive.manifests("RIFT_0")[0], "content")
        assert select(path) == [(stored.sequence, stored.data) for stored in scribe.streams["RIFT_0"]]


# --- what it refuses -----------------------------------------------------------------------------


def broken(messages: list[Stored], data: bytes) -> list[Stored]:
    return [*messages[:4], Stored(messages[4].subject, 5, 1, data), *messages[5:]]


REFUSED: dict[str, tuple[Callable[[list[Stored]], list[Stored]], int, str]] = {
    "a gap": (lambda m: m[:4] + m[5:], 8, "RIFT_0: 6 came where 5 was to be sealed"),
    "too few": (lambda m: m[:4], 8, "nothing came after 4, and 8 was to be sealed"),
    "too many": (lambda m: m, 7, "8 came where 8 was to be sealed"),
    "none wanted": (lambda m: [], 0, "archived up to 0: nothing to seal up to 0"),
    "no record": (lambda m: broken(m, b"{"), 8, "RIFT_0:5 cannot be archived: not a record"),
    "an unknown event": (
        lambda m: broken(m, b'{"version":1,"writer":"w","events":[{"type":"Odd"}]}'),
        8,
        r"RIFT_0:5 cannot be archived: event 0 \(Odd\) cannot be read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sealed_is_refused_and_nothing_sealed(case: str, scribe: Any, tmp_path: Path) -> None:
    spoil, last, why = REFUSED[case]
    scribe.prices()
    scribe.finished_request()
    scribe.accept()
    scribe.accept()
    archive = Archive(tmp_path, key=KEY)
    with pytest.raises(ArchiveError, match=why):
        archive.seal("RIFT_0", spoil(scribe.streams["RIFT_0"]), last=last)
    assert archive.manifests("RIFT_0") == []
    seal_all(archive, scribe.streams)
    assert list(archive.verify()) == []


def test_two_do_not_seal_at_once(scribe: Any, tmp_path: Path) -> None:
    scribe.accept()
    archive = Archive(tmp_path, key=KEY)

    def messages() -> Any:
        with pytest.raises(ArchiveError, match="another process is sealing into"):
            Archive(tmp_path, key=KEY).seal("RIFT_0", scribe.streams["RIFT_0"], last=1)
        yield from scribe.streams["RIFT_0"]

    archive.seal("RIFT_0", messages(), last=1)
    assert archive.last("RIFT_0") == 1


def test_a_crash_at_any_step_leaves_no_segment_and_no_harm(scribe: Any, tmp_path: Path) -> None:
    for _ in range(3):
        scribe.finished_request()
    messages = scribe.streams["RIFT_0"]
    for step in ("measure", "sync", "create", "link"):
        folder = tmp_path / step
        archive = Archive(folder, key=KEY)
        archive.seal("RIFT_0", messages[:4], last=4)
        child = multiprocessing.get_context("fork").Process(target=_die_at, args=(archive, step, messages))
        child.start()
        child.join(60)
        assert child.exitcode == 7, step
        assert archive.last("RIFT_0") == 4
        assert list(archive.verify(anchors=anchors(archive))) == []
        archive.seal("RIFT_0", messages[4:], last=len(messages))
        assert list(archive.verify(anchors=anchors(archive), log_first={"RIFT_0": len(messages) + 1})) == []
        assert not [path for path in files(folder) if path.suffix == ".part"]


def _die_at(archive: Archive, step: str, messages: list[Stored]) -> None:
    """Seal in a process of its own, which ends for good at a step."""
    left = 3 if step == "sync" else 0

    def die(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os._exit(7)

    setattr(os if step == "link" else archives, step, die)
    archive.seal("RIFT_0", messages[4:], last=len(messages))


# --- damage --------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(dice=st.randoms(use_true_random=False))
def test_any_flipped_byte_is_found(sealed: Archive, dice: random.Random) -> None:
    path = dice.choice(files(sealed.folder))
    whole = path.read_bytes()
    at = dice.randrange(len(whole))
    try:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ dice.randint(1, 255)]) + whole[at + 1 :])
        assert list(sealed.verify()) != [], (path, at)
    finally:
        path.write_bytes(whole)
    assert path.read_bytes() == whole


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory, chaos: Any) -> Archive:
    archive = Archive(tmp_path_factory.mktemp("sealed"), key=KEY)
    messages = chaos(random.Random(1)).write(20)["RIFT_0"]
    archive.seal("RIFT_0", messages[:9], last=9)
    archive.seal("RIFT_0", messages[9:], last=len(messages))
    return archive


def test_any_file_missing_truncated_or_grown_is_found(sealed: Archive) -> None:
    known = anchors(sealed)
    for path in files(sealed.folder / "RIFT_0"):
        whole = path.read_bytes()
        for damaged in (None, b"", whole[: len(whole) // 2], whole + b"\n"):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            problems = list(sealed.verify(anchors=known))
            assert any(path.name in line or path.parent.name in line for line in problems), (path, damaged)
            path.write_bytes(whole)
    assert list(sealed.verify(anchors=known)) == []


def test_a_pipe_is_damage_instead_of_a_wait_for_its_writer(sealed: Archive) -> None:
    for path in files(sealed.folder / "RIFT_0"):
        whole = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(ArchiveDamaged, match=f"{path} is not a file"):
            sealed.manifests("RIFT_0")
        assert any(f"{path} is not a file" in line for line in sealed.verify())
        path.unlink()
        path.write_bytes(whole)


def drop(archive: Archive, index: int) -> None:
    manifest = archive.manifests("RIFT_0")[index]
    for path in files(archive.folder / "RIFT_0"):
        if path.name.startswith(f"{manifest.first:020d}"):
            path.unlink()


def test_a_dropped_segment_is_found(archive: Archive) -> None:
    drop(archive, 1)
    assert [line for line in archive.verify() if "sequences 21 to 21 are missing" in line]
    assert [line for line in archive.verify() if "does not follow" in line]


def test_a_dropped_first_segment_is_found(archive: Archive) -> None:
    drop(archive, 0)
    assert [line for line in archive.verify() if "sequences 1 to 20 are missing" in line]


def test_a_dropped_last_segment_is_found_by_its_anchor_and_by_the_log(archive: Archive) -> None:
    known = anchors(archive)
    drop(archive, -1)
    assert list(archive.verify()) == []
    assert list(archive.verify(anchors=known)) == [
        "RIFT_0: the segment of 22 to 60 was sealed and is missing"
    ]
    assert list(archive.verify(log_first={"RIFT_0": 61})) == [
        "RIFT_0: sequences 22 to 60 are neither in the archive nor in the log"
    ]
    assert list(archive.verify(log_first={"RIFT_0": 22})) == []


def test_a_lost_stream_is_found_by_its_anchors(archive: Archive, tmp_path: Path) -> None:
    known = anchors(archive)
    for index in (-1, -1, -1):
        drop(archive, index)
    assert len(list(archive.verify(anchors=known))) == 3
    assert Archive(tmp_path / "none", key=KEY).streams() == []


def test_a_segment_that_the_book_does_not_name_is_found(archive: Archive) -> None:
    known = anchors(archive) | {"RIFT_0": anchors(archive)["RIFT_0"][:2]}
    newest = archive.newest()
    assert newest == {"RIFT_0": 22, subjects.BOOK: 1}
    assert list(archive.verify(anchors=known, newest={"RIFT_0": 21})) == [], "sealed after the book was read"
    (problem,) = archive.verify(anchors=known, newest=newest)
    assert problem.startswith("RIFT_0: the segment of 22 to 60 is not named by the book")
    assert len(list(archive.verify(anchors={}, newest=newest))) == 4, "an archive of another log"


def test_an_archive_written_anew_is_found_by_its_anchors(
    archive: Archive, chaos: Any, tmp_path: Path
) -> None:
    """The forged archive is consistent, but differs from the sealed one."""
    forged = Archive(tmp_path / "forged", key=KEY)
    streams = chaos(random.Random(4)).write(60)
    for last in (20, 21, 60):
        forged.seal("RIFT_0", streams["RIFT_0"][forged.last("RIFT_0") : last], last=last)
    assert list(forged.verify()) == []
    problems = list(forged.verify(anchors={"RIFT_0": anchors(archive)["RIFT_0"]}))
    assert problems == [
        f"RIFT_0: the manifest of {first} to {last} is not the one that the book names"
        for first, last in ((1, 20), (21, 21), (22, 60))
    ]


ROWS_CHANGED = {
    "an event": ("events", "* replace (worker || 'x' as worker)", "", "does not come out"),
    "an event's time": ("events", "* replace (at_ns + 1 as at_ns)", "", "does not come out"),
    "an event less": ("events", "*", "where place <> 0", "does not come out"),
    "a subject": ("records", "* replace (subject || 'x' as subject)", "", "does not come out"),
    "a record's hash": ("records", "* replace (sha256(hash) as hash)", "", "Merkle root"),
    "a time": ("records", "* replace (at_ns - 1 as at_ns)", "", "otherwise than its manifest says"),
    "an order": ("records", "* replace (60 + 22 - sequence as sequence)", "", "Merkle root"),
    "a record less": ("records", "*", "where sequence <> 30", "holds 31 where 30 was expected"),
}


@pytest.mark.parametrize("case", ROWS_CHANGED)
def test_rows_that_were_changed_with_their_file_hashes_are_found(case: str, archive: Archive) -> None:
    suffix, columns, where, why = ROWS_CHANGED[case]
    *_, manifest = archive.manifests("RIFT_0")
    path = archive.path(manifest, suffix)
    changed = path.with_name("changed.parquet")
    duckdb.execute(
        f"copy (select {columns} from read_parquet('{path}') {where}) to '{changed}' (format parquet)"
    )
    data = changed.replace(path).read_bytes()
    named = manifest.files | {path.name: File(len(data), hashlib.sha256(data).hexdigest())}
    forged = msgspec.structs.replace(manifest, files=named)
    path.with_name(f"{manifest.first:020d}.json").write_bytes(forged.encoded)
    problems = list(archive.verify())
    assert any(why in line for line in problems), problems


def test_a_damaged_file_says_so_when_it_is_read(archive: Archive) -> None:
    first = archive.manifests("RIFT_0")[0]
    archive.path(first, "events").write_bytes(b"PAR1")
    with pytest.raises(ArchiveDamaged, match=r"00000000000000000001.events.parquet cannot be read"):
        list(archive.records("RIFT_0"))
    path = archive.path(first, "events").with_name("00000000000000000001.json")
    path.write_bytes(b"{}")
    with pytest.raises(ArchiveDamaged, match=r"00000000000000000001.json is no manifest"):
        archive.manifests("RIFT_0")


def test_ctrl_c_ends_a_question_as_it_ends_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A suite that a shell runs in the background ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with parquet.Segments(tmp_path) as segments:
            monkeypatch.setattr(parquet, "sql", lambda name: "select count(*) from range(100000000000)")
            ctrl_c = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
            ctrl_c.start()
            with pytest.raises(KeyboardInterrupt):
                list(segments.records(tmp_path / "records.parquet"))
            ctrl_c.join()
    finally:
        signal.signal(signal.SIGINT, before)
