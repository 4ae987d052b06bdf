"""The auditor against a simple reckoning and every kind of tampering."""

import ast
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from events.schema import CancelRequested, PeriodClosed, RequestFinished
from events.subjects import Address
from replay import audit_export, auditor
from tests.replay import reckoning
from tests.replay.audits import FILES, PERIOD, export, exported, lines_of, ordinary, prices, run
from tests.replay.conftest import Scribe, started, tokens_of
from tests.replay.months import ACCOUNTS, Months
from tests.replay.sealed import SealedLists

AUDITOR = Path(auditor.__file__)


# --- the auditor and the reckoning agree


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_auditor_equals_the_plain_reckoning(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    history = Months(random.Random(seed))
    streams = history.write(150)
    for period in sorted(history.months()):
        for account in ACCOUNTS:
            folder = tmp_path_factory.mktemp("export")
            invoice = reckoning.invoice(streams, account, period)
            audit = auditor.Audit(export(history.archive, streams, invoice, folder))
            bill = audit.check()
            assert audit.wrong == []
            assert bill["total_nanousd"] == invoice["total_nanousd"]


@pytest.mark.parametrize("seed", range(3))
def test_an_open_invoice_may_reach_less_far_than_the_archive(seed: int, tmp_path: Path) -> None:
    history = Months(random.Random(seed))
    streams = history.write(60)
    positions = history.archive.positions()
    period = max(history.months())
    history.write(60)
    assert positions != history.archive.positions()
    invoice = reckoning.invoice(streams, "dev", period, positions)
    cut = {stream: messages[: positions[stream]] for stream, messages in streams.items()}
    audit = auditor.Audit(export(history.archive, cut, invoice, tmp_path))
    audit.check()
    assert audit.wrong == []


def test_the_words_of_an_equal_bill(scribe: Scribe, tmp_path: Path, capsys: Any) -> None:
    folder = exported(ordinary(scribe), tmp_path)
    code, output = run(folder, capsys)
    # 7 + 3 tokens; 3 of the prompt, 4 cached and 3; a second; less 7.
    total = (70 + 60) + (30 + 12 + 60) + 10**6 - 7
    heads = json.loads((folder / "invoice.json").read_text())["heads"]
    records = len((folder / "records.jsonl").read_text().splitlines())
    assert code == 0
    assert output.splitlines() == [
        f"equal: account dev, period 2023-11 (open): {total} nano-USD (0.001000225 USD), 3 requests, "
        f"{records} records",
        f"head: RIFT_0:{len(scribe.streams['RIFT_0'])} {heads['RIFT_0']}",
        f"head: RIFT_BOOK:{len(scribe.streams['RIFT_BOOK'])} {heads['RIFT_BOOK']}",
        "signatures: none in this export",
    ]


@pytest.mark.slow
def test_the_file_runs_alone(scribe: Scribe, tmp_path: Path) -> None:
    """Run the auditor like a customer: as a copy, isolated from the repository."""
    folder = exported(ordinary(scribe), tmp_path / "export")
    copy = tmp_path / "auditor.py"
    copy.write_bytes(AUDITOR.read_bytes())

    def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", str(copy), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    equal = alone(str(folder))
    assert (equal.returncode, equal.stdout[:6], equal.stderr) == (0, "equal:", "")
    invoice = folder / "invoice.json"
    invoice.write_text(invoice.read_text().replace('"total_nanousd":1', '"total_nanousd":2'))
    different = alone(str(folder))
    assert (different.returncode, different.stderr) == (1, "")
    assert "invoice.total_nanousd is 2000225, by the log it is 1000225" in different.stdout
    (folder / "chain.jsonl").unlink()
    unreadable = alone(str(folder))
    assert unreadable.returncode == 2
    expected = f"'{folder}' must be a folder that `rift audit export` wrote"
    assert unreadable.stderr == f"unreadable: chain.jsonl: No such file or directory; {expected}\n"


# --- tampering: always exit status 1 or 2, and an error that names the place


def write(folder: Path, name: str, rows: list[Any]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def leaves(value: Any, *path: Any) -> Any:
    if isinstance(value, dict | list):
        for name in value if isinstance(value, dict) else range(len(value)):
            yield from leaves(value[name], *path, name)
    else:
        yield path


def changed(value: Any) -> Any:
    """Return another value of the same type; hex stays hex."""
    if isinstance(value, int):
        return value + 1
    return value[:-1] + ("0" if value[-1:] != "0" else "1")


def change(rows: list[Any], path: tuple[Any, ...], how: Callable[[Any], Any] = changed) -> list[Any]:
    copy = json.loads(json.dumps(rows))
    part = copy
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = how(part[path[-1]])
    return copy


@pytest.fixture
def tampered(scribe: Scribe, tmp_path: Path, capsys: Any) -> Callable[[str, list[Any]], str]:
    """Return a function that replaces the rows of one file and returns the auditor's output."""
    folder = exported(ordinary(scribe), tmp_path)
    originals = {name: (folder / name).read_bytes() for name in FILES}

    def output_of(name: str, rows: list[Any]) -> str:
        write(folder, name, rows)
        code, output = run(folder, capsys)
        (folder / name).write_bytes(originals[name])
        assert output.startswith("equal:") if code == 0 else code in (1, 2)
        return output

    output_of.folder = folder  # type: ignore[attr-defined]
    return output_of


def test_every_value_of_the_invoice(tampered: Any) -> None:
    rows = lines_of(tampered.folder, "invoice.json")
    paths = list(leaves(rows))
    assert len(paths) > 40
    for path in paths:
        for how in (changed, lambda value: float(value) if type(value) is int else None):
            output = tampered("invoice.json", change(rows, path, how))
            assert not output.startswith("equal:"), path
            if path[1] not in ("account", "period"):
                assert f"invoice.{'.'.join(map(str, path[1:]))} is " in output, path


def test_the_lines_of_the_invoice(tampered: Any) -> None:
    (row,) = lines_of(tampered.folder, "invoice.json")
    first, *rest = row["lines"]
    for lines in (rest, [first, first, *rest], [*rest, first], [first | {"discount": 5}, *rest]):
        assert re.match(r"different:\sinvoice\.lines\.", tampered("invoice.json", [row | {"lines": lines}]))


@pytest.mark.parametrize("name", ["records.jsonl", "proofs.jsonl", "chain.jsonl"])
def test_every_row_dropped_doubled_or_swapped(tampered: Any, name: str) -> None:
    rows = lines_of(tampered.folder, name)
    assert len(rows) > 4
    for at, row in enumerate(rows):
        assert not tampered(name, rows[:at] + rows[at + 1 :]).startswith("equal:")
        if name != "proofs.jsonl":  # there a row that is repeated, or stands elsewhere, proves the same
            assert not tampered(name, [*rows[:at], row, *rows[at:]]).startswith("equal:")
            if at and (name == "records.jsonl" or row["stream"] == rows[at - 1]["stream"]):
                swapped = [*rows[: at - 1], row, rows[at - 1], *rows[at + 1 :]]
                assert not tampered(name, swapped).startswith("equal:")


@pytest.mark.parametrize("name", ["records.jsonl", "proofs.jsonl", "chain.jsonl"])
def test_every_value_of_a_row(tampered: Any, name: str) -> None:
    rows = lines_of(tampered.folder, name)
    for path in leaves(rows):
        output = tampered(name, change(rows, path))
        assert not output.startswith("equal:"), path
        assert any(file in output for file in (*FILES, "invoice.", "prices of the book", "at RIFT_BOOK:")), (
            output
        )


def test_what_is_said(tampered: Any) -> None:
    """The message names the file and line, or the segment, that was changed."""
    chain, records, proofs = (lines_of(tampered.folder, name) for name in FILES[1:])
    assert "chain.jsonl line 1: previous is not ''" in tampered("chain.jsonl", chain[1:2] + chain[1:])
    assert "chain.jsonl line 2: first is not 10" in tampered("chain.jsonl", chain[:1] + chain[2:])
    assert "records.jsonl: no proof of RIFT_0:1 to 9" in tampered("records.jsonl", records[1:])
    assert "records.jsonl line 2: out of order" in tampered("records.jsonl", records[:1] + records)
    extra = proofs[0] | {"nodes": [*proofs[0]["nodes"], "0" * 64]}
    assert "no proof of RIFT_0:1 to 9" in tampered("proofs.jsonl", [extra, *proofs[1:]])
    unknown = proofs[0] | {"first": 2}
    assert "proofs.jsonl: RIFT_0:2 belongs to no record" in tampered("proofs.jsonl", [*proofs, unknown])
    for name in FILES:
        (tampered.folder / name).write_text('{"a":1}\nnonsense\n')
        assert "unreadable: " in tampered(name, [{}]), name


def test_one_line_names_the_first_thing_that_is_wrong(tampered: Any) -> None:
    chain, records, proofs = (lines_of(tampered.folder, name) for name in FILES[1:])
    files = {"chain.jsonl": chain, "records.jsonl": records, "proofs.jsonl": proofs}
    outputs = [tampered(name, rows[:-1]) for name, rows in files.items()]
    outputs += [tampered(name, rows[1:]) for name, rows in files.items()]
    outputs += [tampered(name, [{}]) for name in FILES]
    outputs += [tampered(name, []) for name in FILES]
    outputs += [tampered("chain.jsonl", change(chain, (0, "manifest")))]
    for output in outputs:
        assert output.count("\n") == 1, output
        assert any(file in output for file in (*FILES, "invoice.", "at RIFT_BOOK:")), output
        assert "Error" not in output, output
    assert outputs[6] == "unreadable: invoice.json line 1: 'account' is missing\n"


def test_each_flipped_byte_gives_one_line(tampered: Any, capsys: Any) -> None:
    for name in FILES:
        path = tampered.folder / name
        original = path.read_bytes()
        for at in range(0, len(original), 61):
            path.write_bytes(original[:at] + bytes([original[at] ^ 0x81]) + original[at + 1 :])
            code, output = run(tampered.folder, capsys)
            assert code == 2, (name, at)
            line = original[:at].count(b"\n") + 1
            assert output.startswith(f"unreadable: {name} line {line}: 'utf-8' codec can't decode"), output
            assert output.count("\n") == 1
            path.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
            code, output = run(tampered.folder, capsys)
            assert code == 0 or name == "invoice.json" or output.count("\n") == 1, output
        path.write_bytes(original)


@pytest.mark.parametrize("version", ["(3, 6, 8)", "(3, 8, 18)"])
def test_an_old_python_is_named_in_one_sentence(version: str) -> None:
    """Old interpreters read the file up to the check: it has no newer syntax before it or after it."""
    text = AUDITOR.read_text()
    ast.parse(text, feature_version=(3, 7))
    assert "from __future__" not in text
    code = f"import sys, runpy; sys.version_info = {version}; runpy.run_path({str(AUDITOR)!r})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "auditor.py needs Python 3.9 or newer: run it with another one\n"


def test_every_event_hidden(tampered: Any) -> None:
    """If an event is replaced by its hash, the bill differs, or the event had no effect on it."""
    rows = lines_of(tampered.folder, "records.jsonl")
    bill = tampered("records.jsonl", rows)
    assert bill.startswith("equal:")
    hidden = 0
    for row in rows:
        for index, event in enumerate(row["events"]):
            if isinstance(event, dict):
                row["events"][index] = auditor.sha256(event["json"])
                output = tampered("records.jsonl", rows)
                hidden += output != bill
                assert output == bill or not output.startswith("equal:")
                row["events"][index] = event
    assert hidden > 10


def test_an_event_of_another_account_smuggled_in(scribe: Scribe, tmp_path: Path, capsys: Any) -> None:
    """The event has the right hash and position, but belongs to another account."""
    folder = exported(ordinary(scribe), tmp_path)
    archive = SealedLists()
    archive.seal(scribe.streams)
    known = {
        auditor.sha256(event): event
        for stream in archive.streams()
        for record in archive.bare_records(archive.manifests(stream)[0])
        for event in record.events
    }
    rows, smuggled = lines_of(folder, "records.jsonl"), 0
    for number, row in enumerate(rows, 1):
        for index, event in enumerate(row["events"]):
            if not isinstance(event, dict):
                row["events"][index] = {"json": known[event]}
                write(folder, "records.jsonl", rows)
                code, output = run(folder, capsys)
                assert code == 1
                assert f"records.jsonl line {number}: event {index} is not the account's" in output
                row["events"][index] = event
                smuggled += 1
    assert smuggled == 4


def test_an_event_that_stands_elsewhere_is_nobodys(
    scribe: Scribe, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation counts only in the lane of its request."""
    prices(scribe, 1)
    request = scribe.accept()
    elsewhere = Address(0, "laneother", "tiny-1")
    scribe.tell(CancelRequested(request=request, why="unanswered"), at=elsewhere, kind="cancel")
    scribe.tell(started(request, "att"), tokens_of("att", 0))
    scribe.tell(RequestFinished(request=request, attempt="att", reason="stop", output_tokens=1))
    assert run(exported(scribe, tmp_path / "sound"), capsys)[0] == 0
    monkeypatch.setattr(audit_export._Shard, "shown", lambda part, record: [True for _ in record.events])
    folder = tmp_path / "shown"
    # The exporter checks itself and removes a failed export, which is the forged one here.
    with monkeypatch.context() as kept:
        kept.setattr(Path, "unlink", lambda file: None)
        with pytest.raises(audit_export.AuditError, match="does not hold request"):
            exported(scribe, folder)
    (tmp_path / "sound" / "records.jsonl").write_bytes((folder / "records.jsonl").read_bytes())
    (tmp_path / "sound" / "proofs.jsonl").write_bytes((folder / "proofs.jsonl").read_bytes())
    code, output = run(tmp_path / "sound", capsys)
    assert (code, output.splitlines()) == (
        1,
        ["different: records.jsonl line 2: event 0 is not the account's, or of no request here"],
    )


@pytest.mark.parametrize(
    ("name", "value"), [("stream", "RIFT_1"), ("records", 8), ("first", 2), ("previous", "0" * 64)]
)
def test_a_chain_that_is_written_anew(
    name: str, value: Any, scribe: Scribe, tmp_path: Path, capsys: Any
) -> None:
    """A changed manifest is detected even if all hashes that depend on it are recomputed."""
    folder = exported(ordinary(scribe), tmp_path)
    (invoice,) = lines_of(folder, "invoice.json")
    chain, previous = lines_of(folder, "chain.jsonl"), ""
    for row in chain:
        if row["stream"] == "RIFT_0":
            manifest = json.loads(row["manifest"]) | {"previous": previous}
            row["manifest"] = json.dumps(manifest | ({name: value} if not previous else {}))
            invoice["heads"]["RIFT_0"] = previous = auditor.sha256(row["manifest"])
    write(folder, "chain.jsonl", chain)
    write(folder, "invoice.json", [invoice])
    code, output = run(folder, capsys)
    assert code == 1
    # The first segment may begin anywhere, so a changed `first` shows in the number of records.
    assert f"chain.jsonl line 1: {'records' if name == 'first' else name} is not " in output


def test_a_month_that_was_closed_with_another_log(scribe: Scribe, tmp_path: Path, capsys: Any) -> None:
    ordinary(scribe)
    archive = SealedLists()
    archive.seal(scribe.streams)
    close = PeriodClosed(
        id="close",
        period=PERIOD,
        positions=archive.positions(),
        roots=archive.heads(),
        digest="0" * 64,
    )
    for roots, expected in ((archive.heads(), 0), ({"RIFT_0": "0" * 64}, 1)):
        closed = Scribe()
        closed.streams = {name: [*messages] for name, messages in scribe.streams.items()}
        closed.book(replace(close, roots=roots))
        archive = SealedLists()
        archive.seal(scribe.streams)
        archive.seal(closed.streams)
        invoice = reckoning.invoice(closed.streams, "dev", PERIOD)
        code, output = run(export(archive, closed.streams, invoice, tmp_path / str(expected)), capsys)
        assert code == expected
        assert expected == 0 or "2023-11 was closed with another log of RIFT_0" in output


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_byte_of_any_file(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every byte that changes the bill is detected."""
    folder, bill = _the_export(tmp_path_factory)
    name = data.draw(st.sampled_from(FILES))
    text = (folder / name).read_bytes()
    at = data.draw(st.integers(0, len(text) - 1))
    byte = data.draw(
        st.sampled_from(sorted({*b'0123456789abcdef"{}[],:-.\\ \n\x00\xff', text[at] ^ 1} - {text[at]}))
    )
    (folder / name).write_bytes(text[:at] + bytes([byte]) + text[at + 1 :])
    try:
        audit = auditor.Audit(folder)
        assert audit.check() == bill or audit.wrong
    except auditor.NONSENSE:
        assert audit.at
    finally:
        (folder / name).write_bytes(text)


_kept: list[Any] = []


def _the_export(folders: pytest.TempPathFactory) -> tuple[Path, Any]:
    if not _kept:
        folder = exported(ordinary(Scribe()), folders.mktemp("export"))
        _kept.append((folder, auditor.Audit(folder).check()))
    return _kept[0]


def test_a_forged_log_has_other_heads(scribe: Scribe, tmp_path: Path, capsys: Any) -> None:
    """A completely forged log is detected by the heads that were published earlier."""
    honest = lines_of(exported(ordinary(scribe), tmp_path / "honest"), "invoice.json")[0]
    forged = ordinary(Scribe())
    forged.finished_request(tokens=900, plan="per_second")
    folder = exported(forged, tmp_path / "forged")
    code, output = run(folder, capsys)
    assert code == 0
    assert honest["heads"]["RIFT_0"] not in output
    assert honest["heads"]["RIFT_BOOK"] in output
