"""Bare events: no content, the same fold, and hashes that any part's change changes."""

from pathlib import Path

import msgspec
import pytest

from events import codec, redaction
from events.lifecycle import NEW, advance
from events.schema import RequestAccepted, RequestFinished, TokensGenerated

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.json"))
TOLD = {"content": "-", "events": ["ab" * 32], "subject": "rift.0.lane.x", "writer": "w x"}
KEY = b"k"


def golden(path: Path) -> object:
    return codec.decode(b'{"version":1,"writer":"w","events":[%s]}' % path.read_bytes())[1][0]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_bare_event_is_read_as_the_event_without_its_content(path: Path) -> None:
    event = golden(path)
    text, content = redaction.split(event)
    again = redaction.decode(text)
    assert type(again) is type(event)
    assert redaction.split(again)[0] == text, "bare already"
    if content is None:
        assert again == event


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_no_content_is_left(path: Path) -> None:
    text, content = redaction.split(golden(path))

    def words(value: object) -> list[str]:
        if isinstance(value, str):
            return [value]
        built = msgspec.to_builtins(value)
        if isinstance(built, dict):
            return [word for name, item in built.items() if name != "role" for word in words(item)]
        return [word for item in built for word in words(item)] if isinstance(built, list | tuple) else []

    told = [word for word in words(content) if word] if content is not None else []
    assert not [word for word in told if word.encode() in text]
    assert (content is not None) == isinstance(golden(path), RequestAccepted | TokensGenerated) or (
        isinstance(golden(path), RequestFinished) and content is not None
    )


def test_bare_tokens_count_as_the_tokens_do() -> None:
    life = advance(NEW, golden(next(path for path in GOLDEN if path.stem == "RequestAccepted.1")))
    start = golden(next(path for path in GOLDEN if path.stem == "AttemptStarted.1"))
    life = advance(life, msgspec.structs.replace(start, after=None, resume_index=0))
    said = TokensGenerated(attempt=start.attempt, index=0, token_ids=(5, 6, 7), text="abc", cached_tokens=2)
    told = redaction.decode(redaction.split(said)[0])
    assert advance(life, told) == advance(life, said)
    assert told.cached_tokens == 2


def test_a_content_hash_needs_the_key_and_is_none_of_nothing() -> None:
    assert redaction.content_hash(KEY, [None, None]) == "-"
    assert redaction.content_hash(KEY, [None, ["a"]]) != redaction.content_hash(KEY, [None, ["b"]])
    assert redaction.content_hash(KEY, [None, ["a"]]) != redaction.content_hash(KEY, [["a"], None])
    assert redaction.content_hash(KEY, [["a"]]) != redaction.content_hash(b"other", [["a"]])


def test_every_part_of_a_record_is_in_its_hash() -> None:
    told = {"stream": "RIFT_0", "sequence": 1, "at_ns": 2} | TOLD
    changed = {
        "stream": "RIFT_1",
        "sequence": 2,
        "at_ns": 3,
        "content": "cd" * 32,
        "events": [],
        "subject": "rift.0.lane.y",
        "writer": "w",
    }
    hashes = {
        redaction.RecordParts(**(told | {name: value})).record_hash() for name, value in changed.items()
    }
    assert len(hashes | {redaction.RecordParts(**told).record_hash()}) == len(changed) + 1
