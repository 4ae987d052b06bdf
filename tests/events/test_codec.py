"""Records to bytes and back, and the golden files: every record ever written can still be read.

`golden/<Event>.<version>.json` is one event as a writer of that version stored it. Files are added when a
schema grows, and never edited: an edit here is history rewritten.
"""

import json
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from events import codec
from events.codec import RecordUnreadable, Unreadable
from events.schema import AnyEvent, ControlElected, KeyIssued, ReplicaLost, RequestAccepted, TokensGenerated

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("*.json"))
EVENTS = get_args(AnyEvent)
# Fields whose keys are not names of ours.
MAPS = ("positions", "inputs", "roots", "metadata")
TOKENS = TokensGenerated(attempt="att_a", index=3, token_ids=(1, 2), text="ä🌊")


def record(*events: str, version: int = 1) -> bytes:
    return f'{{"version":{version},"writer":"w","events":[{",".join(events)}]}}'.encode()


def texts() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in FILES}


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_every_event_has_a_golden_file(event: type) -> None:
    assert (GOLDEN / f"{event.__name__}.1.json").exists(), "write down once how this event is stored"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    writer, (event,) = codec.decode(record(text))
    assert writer == "w"
    assert type(event).__name__ == path.stem.partition(".")[0], event
    assert json.loads(codec.encode_event(event)) == json.loads(text)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_golden_files_hold_every_field_of_their_version(event: type) -> None:
    """A field that no golden file has shows no change of its meaning."""
    shown: set[str] = set()
    for path in GOLDEN.glob(f"{event.__name__}.*.json"):
        shown |= set(json.loads(path.read_text(encoding="utf-8")))
    # Not written while it is 1; see the next test.
    assert set(event.__struct_fields__) - shown <= {"rules"}


def test_an_acceptance_that_names_no_rules_is_under_the_first() -> None:
    accepted = json.loads(texts()["RequestAccepted.1"])
    assert "rules" not in accepted
    _, (event,) = codec.decode(record(json.dumps(accepted)))
    assert isinstance(event, RequestAccepted)
    assert event.rules == 1


def test_unknown_fields_are_ignored_at_every_depth() -> None:
    for text in texts().values():
        later = json.loads(text) | {"of_a_newer_writer": {"deep": [1, {"er": None}]}}
        for name, value in later.items():
            if isinstance(value, dict) and name not in MAPS:
                value["of_a_newer_writer"] = 1
        _, (now,) = codec.decode(record(json.dumps(later)))
        _, (then,) = codec.decode(record(text))
        assert now == then


def test_an_unreadable_event_fails_alone() -> None:
    newer = '{"type":"ThoughtRecorded","request":"req_1","attempt":"att_1","thought":"hm"}'
    wrong = '{"type":"TokensGenerated","attempt":"att_2","index":-1,"token_ids":[1],"text":""}'
    nameless = '{"type":"ThoughtRecorded"}'
    good = codec.encode_event(TOKENS).decode()
    _, events = codec.decode(record(good, newer, good, wrong, nameless, good))
    assert [event for event in events if not isinstance(event, Unreadable)] == [TOKENS] * 3
    unreadable = [event for event in events if isinstance(event, Unreadable)]
    assert [(event.type, event.request, event.attempt) for event in unreadable] == [
        ("ThoughtRecorded", "req_1", "att_1"),
        ("TokensGenerated", None, "att_2"),
        ("ThoughtRecorded", None, None),
    ]
    assert "index" in unreadable[1].problem


@pytest.mark.parametrize(
    "data",
    [
        b"null",
        b"[]",
        b"{}",
        b'{"version":1,"writer":"w"}',
        b'{"version":1,"writer":"w","events":[',
        b'{"version":1,"writer":"\xff","events":[]}',
        record(version=2),
        record('{"type":"Thought"}', version=2),
        record("null"),
        record("{}"),
        record('{"type":5}'),
        record(codec.encode_event(TOKENS).decode()) + b"x",
        b"[" * 100_000,
    ],
)
def test_what_is_no_record_stops_its_reader(data: bytes) -> None:
    with pytest.raises(RecordUnreadable):
        codec.decode(data)


@pytest.mark.parametrize(
    ("event", "subject"),
    [
        (KeyIssued(id="1", key="k", account="acme", sha256="0" * 64), "rift.book.credit.acme"),
        (KeyIssued(id="1", key="k", account="acme", sha256="0" * 64), "rift.0.work.lane1234.tiny-1"),
        (TOKENS, "rift.book.credit.acme"),
        (ControlElected(epoch=2, control="me"), "rift.fleet.tiny-1"),
        (ReplicaLost(replica="r", model="large-2", why=""), "rift.fleet.tiny-1"),
    ],
)
def test_an_event_that_its_subject_does_not_carry_is_unreadable(event: Any, subject: str) -> None:
    _, (found,) = codec.decode(codec.encode("w", [event]), subject)
    assert isinstance(found, Unreadable)
    assert (found.request, found.attempt) == (None, None)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b'{"type":"io.nats.jetstream.api.v1.account_info_response","memory":0}',
        b'{"stream":"RIFT_0","seq":7}',
        b'{"error":{"code":400,"err_code":10071},"stream":"RIFT_0","seq":0}',
    ],
)
def test_an_answer_of_the_broker_has_no_events(data: bytes) -> None:
    assert codec.decode(data, "rift.book.key.x") == ("", ())


def test_tokens_without_an_id_are_unreadable() -> None:
    empty = '{"type":"TokensGenerated","attempt":"a","index":0,"token_ids":[],"text":"x"}'
    _, (event,) = codec.decode(record(empty))
    assert isinstance(event, Unreadable)


def golden_events() -> list[Any]:
    return [codec.decode(record(text))[1][0] for text in texts().values()]


@given(st.text(), st.lists(st.sampled_from(golden_events())))
def test_a_record_is_its_events_one_by_one(writer: str, events: list[Any]) -> None:
    whole = codec.encode(writer, events)
    assert codec.join(writer, [codec.encode_event(event) for event in events]) == whole
    assert codec.decode(whole) == (writer, tuple(events))


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    event = msgspec.structs.replace(TOKENS, text=text)
    assert codec.decode(codec.encode("w", [event]))[1] == (event,)
