"""The signatures of segments and closed months, and the auditor's findings about them."""

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from events.schema import PeriodClosed, SegmentSealed, SigningKeyPublished
from replay import auditor
from replay.archive.signatures import SigningKey, is_valid, problems, signed
from tests.replay import audits
from tests.replay.audits import exported, ordinary, run
from tests.replay.conftest import Scribe
from tests.replay.sealed import SealedLists

KEY, OTHER = SigningKey(b"k" * 32), SigningKey(b"o" * 32)
SEGMENT = SegmentSealed(id="segment.RIFT_0.1", stream="RIFT_0", first=1, last=9, manifest="a" * 64)
CLOSE = PeriodClosed(
    id="period.2023-11",
    period="2023-11",
    positions={"RIFT_0": 9, "RIFT_BOOK": 4},
    roots={"RIFT_0": "a" * 64, "RIFT_BOOK": "b" * 64},
    digest="c" * 64,
)


@pytest.mark.parametrize(
    ("event", "changes"),
    [
        (SEGMENT, {"manifest": "b" * 64}),
        (CLOSE, {"digest": "d" * 64}),
        (CLOSE, {"period": "2023-12"}),
        (CLOSE, {"positions": {"RIFT_0": 10, "RIFT_BOOK": 4}}),
        (CLOSE, {"roots": {"RIFT_0": "a" * 64}}),
        (CLOSE, {"rules": 2}),
    ],
)
def test_a_signature_is_of_every_value(event: Any, changes: dict[str, Any]) -> None:
    stated = signed(event, KEY)
    assert is_valid(stated)
    for wrong in (
        changes,
        {"signer": OTHER.public},
        {"signature": "00" * 64},
        {"signer": "", "signature": ""},
    ):
        assert not is_valid(replace(stated, **wrong)), wrong
    assert signed(event, None) is event


def test_from_the_first_signature_on_everything_is_signed() -> None:
    segment, close = signed(SEGMENT, KEY), signed(CLOSE, KEY)
    stated = [SEGMENT, signed(SEGMENT, OTHER), CLOSE, close, segment, SEGMENT, CLOSE]
    stated.append(replace(close, digest="d" * 64))
    assert list(problems(stated, {KEY.public})) == [
        f"RIFT_0 1 to 9: signed with key {OTHER.public}, which no operator published",
        "RIFT_0 1 to 9: not signed, although the book has a signed entry before it",
        "the close of 2023-11: not signed, although the book has a signed entry before it",
        "the close of 2023-11: the book has a signature that is not valid",
    ]
    assert not list(problems([SEGMENT, CLOSE, segment, close], {KEY.public}))


@pytest.fixture
def folder(scribe: Scribe, tmp_path: Path) -> Path:
    scribe.book(SigningKeyPublished(id="signer.x", key=KEY.public))
    close = replace(CLOSE, period="2023-10", positions={}, roots={})
    scribe.book(signed(close, KEY))
    return exported(ordinary(scribe), tmp_path / "export", KEY)


def changed(folder: Path, **values: str) -> None:
    rows = [json.loads(line) for line in (folder / "signatures.jsonl").read_text().splitlines()]
    assert rows
    text = "".join(json.dumps(row | values) + "\n" for row in rows)
    (folder / "signatures.jsonl").write_text(text)


def test_the_auditor_checks_signatures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = run(folder, capsys)
    assert status == 0, said
    assert said.endswith(f"\nsignatures: valid, by key {KEY.public}\n")
    changed(folder, signature="00" * 64)
    status, said = run(folder, capsys)
    assert status == 1
    assert "signatures.jsonl line 1: the signature is not valid" in said
    changed(folder, manifest="e" * 64)
    assert "signs a manifest that is not in the chain" in run(folder, capsys)[1]


def test_a_key_that_no_operator_published_is_named(
    scribe: Scribe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = run(exported(ordinary(scribe), tmp_path / "export", OTHER), capsys)
    assert status == 0
    assert f"valid, by key {OTHER.public}, which is not in the book up to here" in said


def test_without_the_package_the_auditor_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auditor, "Ed25519PublicKey", None)
    changed(folder, signature="00" * 64)
    status, said = run(folder, capsys)
    assert status == 0
    assert "signatures: 3, not checked: install the package cryptography" in said
    (folder / "signatures.jsonl").unlink()
    assert run(folder, capsys)[0] == 0


def test_the_auditor_names_what_is_not_signed(
    folder: Path, capsys: pytest.CaptureFixture[str], scribe: Scribe, tmp_path: Path
) -> None:
    path = folder / "signatures.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    stream, last = json.loads(first)["stream"], json.loads(first)["last"]
    path.write_text("".join(others))
    status, said = run(folder, capsys)
    assert status == 0, said
    assert f"signatures: a key is in the book, but not signed: {stream} from 1 to {last}\n" in said
    path.unlink()
    assert run(folder, capsys)[1].count("but not signed") == 2
    scribe.book(replace(CLOSE, id="period.x", period="2023-09", positions={}, roots={}))
    # A close that does not count is no reason to refuse a bill.
    scribe.book(replace(CLOSE, id="period.y", period="2023-10", positions={}, roots={}, signature="00" * 64))
    status, said = run(exported(scribe, tmp_path / "later", KEY), capsys)
    assert (status, said.count("but not signed")) == (0, 1), said
    assert "but not signed: the close of 2023-09\n" in said


def test_an_export_shows_the_newest_signature_that_is_valid(
    scribe: Scribe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that may append to the book could add anchors of segments again."""
    honest = audits.anchors

    def anchors(archive: SealedLists, key: SigningKey | None) -> dict[str, list[SegmentSealed]]:
        return {
            stream: [
                *named,
                named[0],
                replace(named[-1], signature="00" * 64),
                replace(named[-1], last=named[-1].last + 1),
            ]
            for stream, named in honest(archive, key).items()
        }

    monkeypatch.setattr(audits, "anchors", anchors)
    scribe.book(SigningKeyPublished(id="signer.x", key=KEY.public))
    status, said = run(exported(ordinary(scribe), tmp_path / "export", KEY), capsys)
    assert status == 0, said
    assert said.endswith(f"\nsignatures: valid, by key {KEY.public}\n")
