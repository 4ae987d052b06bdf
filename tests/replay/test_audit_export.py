"""The contents of an export, and billing bugs that the auditor detects in one."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from events import pricing
from events.schema import AttemptReleased, CancelRequested, RequestAccepted, RequestFinished, TokensGenerated
from replay import audit_export, auditor
from tests.replay import reckoning
from tests.replay.audits import PERIOD, export, exported, limits, lines_of, ordinary, prices, run
from tests.replay.conftest import CANARY, Scribe, started, tokens_of
from tests.replay.months import ACCOUNTS, Months
from tests.replay.sealed import SealedLists
from tests.replay.seconds import SECONDS, runs_of

SECOND_NS = 10**9


def accepted(scribe: Scribe) -> list[RequestAccepted]:
    logged = [logged.event for logged in reckoning.log("RIFT_0", scribe.streams["RIFT_0"])]
    return [event for event in logged if isinstance(event, RequestAccepted)]


# --- contents of an export


def test_nothing_of_another_account_is_exported(scribe: Scribe, tmp_path: Path) -> None:
    folder = exported(ordinary(scribe), tmp_path)
    theirs = {event.request for event in accepted(scribe) if event.account == "acme"}
    assert len(theirs) == 2
    for file in folder.iterdir():
        text = file.read_text()
        for word in (*theirs, "acme", "att-theirs", CANARY):
            assert word not in text, file.name
    records = (folder / "records.jsonl").read_text()
    assert all(event.request in records for event in accepted(scribe) if event.account == "dev")


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_random_exports_hold_nothing_of_others(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    history = Months(random.Random(seed))
    streams = history.write(120)
    period = min(history.months())
    for account in ACCOUNTS:
        invoice = reckoning.invoice(streams, account, period)
        folder = export(history.archive, streams, invoice, tmp_path_factory.mktemp("export"))
        text = "".join(file.read_text() for file in folder.iterdir())
        requests = [name for name, acceptance in history.acceptances.items() if acceptance.account != account]
        attempts = [f'"{attempt}\\"' for name in requests for attempt in history.attempts[name]]
        for word in (*{*ACCOUNTS} - {account}, *requests, *attempts, CANARY):
            assert word not in text


def test_what_cannot_be_exported(scribe: Scribe, tmp_path: Path) -> None:
    ordinary(scribe)
    archive = SealedLists()
    archive.seal({name: messages[:-1] for name, messages in scribe.streams.items()})
    invoice = reckoning.invoice(scribe.streams, "dev", PERIOD)
    with pytest.raises(
        audit_export.AuditError, match=r"reaches RIFT_0:\d+, and no archived segment ends there"
    ):
        export(archive, scribe.streams, invoice, tmp_path / "behind")
    archive.seal(scribe.streams)
    with pytest.raises(
        audit_export.AuditError, match="the close of 2023-11 is not archived yet: seal RIFT_BOOK"
    ):
        export(archive, scribe.streams, invoice | {"status": "closed"}, tmp_path / "closed")
    theirs = next(event.request for event in accepted(scribe) if event.account == "acme")
    with pytest.raises(audit_export.AuditError, match=f"does not hold request {theirs} of dev"):
        audit_export.export(archive, invoice, {theirs: 9}, tmp_path / "theirs", {})
    with pytest.raises(audit_export.AuditError, match="'x' is no request id"):
        audit_export.export(archive, invoice, {"x": 9}, tmp_path / "no-id", {})
    for folder in tmp_path.iterdir():
        assert auditor.main(str(folder)) == 2, "no half of an export is one"
    (tmp_path / "behind" / "x").touch()
    with pytest.raises(audit_export.AuditError, match="behind is not empty"):
        export(archive, scribe.streams, invoice, tmp_path / "behind")


def test_each_segment_is_asked_for_what_is_under_way_there(scribe: Scribe, tmp_path: Path) -> None:
    """Each segment is searched only for requests between their floors and their ends."""
    prices(scribe, 1)
    archive = SealedLists()
    long = scribe.request_id()
    scribe.tell(scribe.accepted(long), kind="request")
    scribe.tell(started(long, "long"))
    between = []
    for number in range(20):
        between.append(scribe.finished_request())
        if number % 2:
            archive.seal(scribe.streams)
        if number == 9:
            scribe.tell(tokens_of("long", 0))
            scribe.tell(RequestFinished(request=long, attempt="long", reason="stop", output_tokens=1))
            scribe.tell(tokens_of("long", 1), step_ns=1)  # in the segment of its end
    scribe.tell(tokens_of("long", 1, 77), step_ns=1)  # a zombie's, in a later one
    archive.seal(scribe.streams)
    folder = export(archive, scribe.streams, reckoning.invoice(scribe.streams, "dev", PERIOD), tmp_path)
    assert auditor.main(str(folder)) == 0
    asked = [own for _, own in archive.asked if own]
    assert len(asked) == 10, "the last has only the zombie's"
    for pair, own in enumerate(asked):
        under_way = between[2 * pair : 2 * pair + 2] + ([long] if pair <= 5 else [])
        assert sorted(own["requests"]) == sorted(under_way)
        assert own["attempts"] == (["long"] if 1 <= pair <= 5 else [])
    events = [
        json.loads(event["json"])
        for row in lines_of(folder, "records.jsonl")
        for event in row["events"]
        if isinstance(event, dict)
    ]
    late = [event["tokens"] for event in events if event.get("attempt") == "long" and event.get("index") == 1]
    assert late == [1]


# Billing bugs: each is planted in the reckoning, on a history that exposes it.


def differs(scribe: Scribe, folder: Path, capsys: Any, plant: Callable[[], None], *words: str) -> None:
    """Check that the auditor accepts the invoice before the bug, and reports `words` with it."""
    assert run(exported(scribe, folder / "sound"), capsys)[0] == 0
    plant()
    code, output = run(exported(scribe, folder / "bug"), capsys)
    assert code == 1
    for word in words:
        assert word in output, output


def test_bug_the_prompt_is_charged_twice_in_a_group(
    scribe: Scribe, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices(scribe, 1)
    for choice in range(3):
        scribe.finished_request(group="grp", choice=choice)

    def plant() -> None:
        everybody = {ended.acceptance.request for ended in reckoning.ends(scribe.streams)}
        monkeypatch.setattr(reckoning, "payers", lambda requests: everybody)

    differs(scribe, tmp_path, capsys, plant, "invoice.lines.0.prompt_tokens is 21, by the log it is 7")


def test_bug_failed_requests_are_charged(
    scribe: Scribe, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices(scribe, 1)
    request = scribe.accept()
    scribe.tell(started(request, "att"), tokens_of("att", 0, 3))
    scribe.tell(RequestFinished(request=request, attempt="att", reason="failed", output_tokens=3))

    def plant() -> None:
        monkeypatch.setattr(pricing, "CHARGEABLE", pricing.CHARGEABLE | {"failed"})

    differs(scribe, tmp_path, capsys, plant, "invoice.total_nanousd is 130, by the log it is 0")


def test_bug_tokens_of_zombies_are_counted(
    scribe: Scribe, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices(scribe, 1)
    request = scribe.accept()
    scribe.tell(started(request, "one"), tokens_of("one", 0, 2))
    scribe.tell(started(request, "two", after="one", resume_index=2), tokens_of("one", 2, 40))
    scribe.tell(tokens_of("two", 2, 1))
    scribe.tell(RequestFinished(request=request, attempt="two", reason="stop", output_tokens=3))
    sound = reckoning.ends

    def every_token(streams: Any) -> Any:
        (ended,) = sound(streams)
        logged = [logged.event for logged in reckoning.log("RIFT_0", streams["RIFT_0"])]
        tokens = sum(len(event.token_ids) for event in logged if isinstance(event, TokensGenerated))
        return [ended._replace(life=replace(ended.life, next_index=tokens))]

    def plant() -> None:
        monkeypatch.setattr(reckoning, "ends", every_token)

    differs(scribe, tmp_path, capsys, plant, "invoice.lines.0.output_tokens is 43, by the log it is 3")


def test_bug_seconds_are_rounded_for_each_attempt(
    scribe: Scribe, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices(scribe, 1, second_nanousd=100)
    limits(scribe, plan="per_second")
    requests = [scribe.accept(plan="per_second") for _ in range(2)]
    for request in requests:  # side by side
        scribe.tell(started(request, request))
    for request in requests:
        scribe.tell(tokens_of(request, 0), step_ns=SECOND_NS)
        scribe.tell(RequestFinished(request=request, attempt=request, reason="stop", output_tokens=1))

    def plant() -> None:
        sound = reckoning.whole_seconds
        monkeypatch.setattr(reckoning, "whole_seconds", lambda spans: sum(sound([span]) for span in spans))

    differs(scribe, tmp_path, capsys, plant, "lines.0.seconds is 5, by the log it is 3", "nanousd is 500")


def test_bug_the_newest_price_is_taken(
    scribe: Scribe, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prices(scribe, 1)
    scribe.finished_request(price_version=1)
    prices(scribe, 2, output_nanousd=21)
    sound = reckoning.ends

    def newest(streams: Any) -> Any:
        version = max(version for version, _ in reckoning.prices(streams))
        return [e._replace(acceptance=replace(e.acceptance, price_version=version)) for e in sound(streams)]

    def plant() -> None:
        monkeypatch.setattr(reckoning, "ends", newest)

    differs(scribe, tmp_path, capsys, plant, "lines.0.price_version is 2, by the log it is 1", "is 133,")


def test_bug_the_price_in_force_is_not_taken(scribe: Scribe, tmp_path: Path, capsys: Any) -> None:
    """The log names another price list or plan than the book has at the recorded position."""
    prices(scribe, 1, second_nanousd=100)
    limits(scribe, plan="per_second")
    limits(scribe, account="acme")
    prices(scribe, 2, second_nanousd=101)
    terms: list[dict[str, Any]] = [
        {"price_version": 1, "plan": "per_token", "book": 1},
        {"price_version": 1, "plan": "per_second", "book": 3},
        {"price_version": 2, "plan": "per_second", "book": 4},
    ]
    for fields in terms:
        scribe.finished_request(**fields)
    assert run(exported(scribe, tmp_path / "sound"), capsys)[0] == 0
    wrong = {
        "price_version is 2, at RIFT_BOOK:3 it is 1": terms[1] | {"price_version": 2},
        "price_version is 1, at RIFT_BOOK:4 it is 2": terms[2] | {"price_version": 1},
        "plan is per_second, at RIFT_BOOK:1 it is per_token": terms[0] | {"plan": "per_second"},
        "plan is per_token, at RIFT_BOOK:2 it is per_second": terms[1] | {"plan": "per_token", "book": 2},
        "price_version is 1, at RIFT_BOOK:0 it is 0": terms[0] | {"book": 0},
    }
    for number, (words, fields) in enumerate(wrong.items()):
        cheated = Scribe()
        cheated.streams = {name: [*messages] for name, messages in scribe.streams.items()}
        cheated.now_ns = scribe.now_ns
        request = cheated.finished_request(**fields)
        code, output = run(exported(cheated, tmp_path / str(number)), capsys)
        assert (code, output) == (1, f"different: {request}: {words}\n")


# --- rules that random histories seldom reach


@pytest.mark.parametrize("name", SECONDS)
def test_a_second_is_charged_once(name: str, scribe: Scribe, tmp_path: Path, capsys: Any) -> None:
    """A second that another month has charged is not charged again, and the export includes its request."""
    expected, archive = runs_of(scribe, name), SealedLists()
    archive.seal(scribe.streams)
    seconds = []
    for period in (PERIOD, "2023-12"):
        invoice = reckoning.invoice(scribe.streams, "dev", period)
        code, output = run(export(archive, scribe.streams, invoice, tmp_path / period), capsys)
        assert code == 0, output
        seconds += [(period, line["price_version"], line["seconds"]) for line in invoice["lines"]]
    assert seconds == expected


def test_the_dead_minutes_of_a_lost_attempt_are_ours(scribe: Scribe, tmp_path: Path, capsys: Any) -> None:
    prices(scribe, 1, second_nanousd=100)
    limits(scribe, plan="per_second")
    request = scribe.accept(plan="per_second")
    scribe.tell(started(request, "one"))
    scribe.tell(tokens_of("one", 0), step_ns=SECOND_NS)
    scribe.tell(AttemptReleased(attempt="one", why="lost"), step_ns=60 * SECOND_NS)
    scribe.tell(started(request, "two", after="one", resume_index=1), tokens_of("two", 1))
    scribe.tell(CancelRequested(request=request, why="client"), step_ns=SECOND_NS)
    scribe.tell(AttemptReleased(attempt="two", why="host"), step_ns=SECOND_NS)
    folder = exported(scribe, tmp_path)
    assert run(folder, capsys)[0] == 0
    (invoice,) = lines_of(folder, "invoice.json")
    assert [line["seconds"] for line in invoice["lines"]] == [1 + 2]
