"""The checker on doctored streams: it counts each fault as its kind, and none in an intact stream."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.chaos.checks import (
    Counts,
    Expected,
    Frame,
    LoggedRequest,
    check_log,
    check_replay,
    check_retrieved,
    check_row,
    check_stream,
    from_log,
)
from tests.chaos.expected import answer
from tests.chaos.ledger import Ledger

# Token 3 is the first byte of a character, so it adds no text yet.
PIECES = [" one", " two", " three", "", "é", " six", " seven"]
EXPECTED = Expected(PIECES, prompt_tokens=5)
CHARGE = 5 * 10 + 7 * 20
USAGE = {"prompt_tokens": 5, "output_tokens": 7, "total_tokens": 12}
DONE = {"id": "req", "finish_reason": "length", "usage": USAGE, "charge": {"nanousd": CHARGE}}
# The frames of a stream: some hold one token, some more.
SHAPE = ((0, " one"), (1, " two three"), (4, "é six"), (6, " seven"))
LOGGED = LoggedRequest(
    1, [(0, 1, " one"), (1, 3, " two three"), (4, 2, "é six"), (6, 1, " seven")], 5, 1, "length"
)
ROW = {
    "finish_reason": "length",
    "prompt_tokens": 5,
    "output_tokens": 7,
    "attempts": 1,
    "charge_nanousd": CHARGE,
}


def stream() -> list[Frame]:
    frames = [Frame(2, "status", {"id": "req", "status": "running", "attempt": 1}, 0.0)]
    for number, (index, delta) in enumerate(SHAPE, 3):
        frames.append(Frame(number, "token", {"id": "req", "index": index, "delta": delta}, 0.1 * number))
    return [*frames, Frame(7, "done", DONE, 1.0)]


def numbered(frames: list[Frame]) -> list[Frame]:
    """Give the frames new ids, so that the doctored part is the only fault."""
    return [frame._replace(id=number) for number, frame in enumerate(frames, 2)]


def summary(counts: Counts) -> tuple[int, int, int, int, int]:
    unexplained, differing = len(counts.unexplained), len(counts.differing)
    return counts.lost, counts.duplicated, counts.reordered, unexplained, differing


def dropped(frames: list[Frame]) -> list[Frame]:
    return numbered(frames[:2] + frames[3:])


def doubled(frames: list[Frame]) -> list[Frame]:
    return numbered(frames[:3] + frames[2:])


def swapped(frames: list[Frame]) -> list[Frame]:
    return numbered([*frames[:2], frames[3], frames[2], *frames[4:]])


def swapped_with_ids(frames: list[Frame]) -> list[Frame]:
    return [*frames[:2], frames[3], frames[2], *frames[4:]]


def doubled_end(frames: list[Frame]) -> list[Frame]:
    return numbered([*frames, frames[-1]])


def no_end(frames: list[Frame]) -> list[Frame]:
    return frames[:-1]


def late_token(frames: list[Frame]) -> list[Frame]:
    return numbered([*frames, frames[-2]])


def other_text(frames: list[Frame]) -> list[Frame]:
    token = frames[1]
    return [frames[0], token._replace(data=token.data | {"delta": " won"}), *frames[2:]]


def repeated_id(frames: list[Frame]) -> list[Frame]:
    return [*frames[:3], frames[3]._replace(id=frames[2].id), *frames[4:]]


def end(**changes: Any) -> Callable[[list[Frame]], list[Frame]]:
    return lambda frames: [*frames[:-1], frames[-1]._replace(data=DONE | changes)]


def failed(frames: list[Frame]) -> list[Frame]:
    error = {"id": "req", "error": {"code": "failed", "message": "the request failed"}}
    return [*frames[:-1], frames[-1]._replace(event="error", data=error)]


@pytest.mark.parametrize(
    ("doctor", "lost", "duplicated", "reordered", "unexplained", "differing"),
    [
        # The client counts fewer tokens than the usage and the charge at the end.
        (dropped, 3, 0, 0, 1, 1),
        # The token without text that follows is counted once.
        (doubled, 0, 2, 0, 0, 0),
        (swapped, 0, 0, 3, 0, 0),
        (swapped_with_ids, 0, 0, 3, 1, 0),
        (doubled_end, 0, 1, 0, 0, 0),
        (no_end, 0, 0, 0, 1, 0),
        (late_token, 0, 1, 0, 1, 0),
        (other_text, 0, 0, 0, 1, 0),
        (repeated_id, 0, 0, 0, 1, 0),
        (failed, 0, 0, 0, 1, 0),
        (end(charge={"nanousd": CHARGE + 1}), 0, 0, 0, 0, 1),
        (end(finish_reason="stop"), 0, 0, 0, 1, 0),
        (end(usage=USAGE | {"output_tokens": 8}), 0, 0, 0, 1, 0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_doctored_stream_is_counted(
    doctor: Callable[[list[Frame]], list[Frame]],
    lost: int,
    duplicated: int,
    reordered: int,
    unexplained: int,
    differing: int,
) -> None:
    counts = check_stream(doctor(stream()), EXPECTED)
    assert summary(counts) == (lost, duplicated, reordered, unexplained, differing), counts
    assert not counts.clean


def test_a_whole_stream_is_clean() -> None:
    for counts in (
        check_stream(stream(), EXPECTED),
        check_log(stream(), LOGGED),
        check_retrieved(stream(), {"output": "".join(PIECES), **DONE}),
        check_replay(stream(), stream()[1:]),
        check_row("req", ROW, LOGGED, charge=CHARGE),
        check_stream(stream(), from_log(LOGGED)),
    ):
        assert counts.clean, counts
    assert Counts().line(3) == "3 cycles, 0 lost, 0 duplicated, 0 reordered, 0 unexplained, charges equal"


def test_a_cancelled_answer_has_its_counted_tokens_and_is_free_if_control_ended_it() -> None:
    logged = LOGGED._replace(tokens=LOGGED.tokens[:2], reason="cancelled")
    cut = EXPECTED.cut(logged)
    usage = USAGE | {"output_tokens": 4, "total_tokens": 9}
    done = {"finish_reason": "cancelled", "usage": usage, "charge": {"nanousd": 5 * 10 + 4 * 20}}
    frames = [*stream()[:3], Frame(9, "done", DONE | done, 1.0)]
    assert check_stream(frames, cut).clean
    assert summary(check_stream(frames, EXPECTED.cut(logged._replace(ender="control")))) == (0, 0, 0, 0, 1)
    assert not check_stream(frames, EXPECTED).clean


def test_a_truncated_stream_loses_each_missing_token() -> None:
    for cut in range(1, 6):
        counts = check_stream(stream()[:cut], EXPECTED)
        received = sum(
            len(range(index, until)) for index, until in ((0, 1), (1, 4), (4, 6), (6, 7))[: cut - 1]
        )
        assert counts.lost == len(PIECES) - received
        assert counts.unexplained == ["the stream never ended"]


@pytest.mark.parametrize("doctor", [dropped, doubled, swapped, late_token, other_text])
def test_the_log_and_a_replay_reveal_what_the_client_missed(
    doctor: Callable[[list[Frame]], list[Frame]],
) -> None:
    assert not check_log(doctor(stream()), LOGGED).clean
    assert not check_replay(stream(), doctor(stream())).clean


def test_the_log_must_hold_the_acceptance_and_the_end() -> None:
    assert not check_log(stream(), None).clean
    assert not check_log(stream(), LOGGED._replace(reason=None)).clean


@pytest.mark.parametrize("name", ["output", "usage", "charge", "finish_reason"])
def test_a_retrieval_that_differs_is_unexplained(name: str) -> None:
    answer = {"output": "".join(PIECES), **DONE} | {name: None}
    assert len(check_retrieved(stream(), answer).unexplained) == 1


def test_the_bill_must_have_the_row_the_facts_and_the_charge() -> None:
    assert summary(check_row("req", None, LOGGED, charge=CHARGE)) == (0, 0, 0, 1, 0)
    assert summary(check_row("req", ROW | {"charge_nanousd": 0}, LOGGED, charge=CHARGE)) == (0, 0, 0, 0, 1)
    assert summary(check_row("req", ROW | {"output_tokens": 8}, LOGGED, charge=CHARGE)) == (0, 0, 0, 1, 0)
    assert summary(check_row("req", ROW | {"attempts": 2}, LOGGED, charge=CHARGE)) == (0, 0, 0, 1, 0)


def accepted(request: str = "r") -> dict[str, Any]:
    return {"type": "RequestAccepted", "request": request}


def started(attempt: str, after: str | None, index: int) -> dict[str, Any]:
    return {
        "type": "AttemptStarted",
        "request": "r",
        "attempt": attempt,
        "after": after,
        "resume_index": index,
        "prompt_tokens": 5,
        "worker": "w",
    }


def generated(attempt: str, index: int, text: str) -> dict[str, Any]:
    return {"type": "TokensGenerated", "attempt": attempt, "index": index, "token_ids": [1], "text": text}


def finished(attempt: str | None, tokens: int) -> dict[str, Any]:
    return {
        "type": "RequestFinished",
        "request": "r",
        "attempt": attempt,
        "reason": "length",
        "output_tokens": tokens,
    }


def test_the_ledger_ignores_a_zombie_and_counts_what_it_ignored() -> None:
    ledger = Ledger()
    for at_ns, event in enumerate(
        [
            accepted(),
            started("a", None, 0),
            generated("a", 0, "x"),
            accepted(),
            started("b", "a", 1),
            generated("a", 1, "zombie"),
            started("late", "a", 1),
            generated("b", 1, "y"),
            finished("a", 2),
            finished("b", 2),
            generated("b", 2, "beyond"),
            finished("b", 2),
        ]
    ):
        ledger.fold(event, at_ns)
    logged = ledger.stories["r"].logged()
    assert logged.tokens == [(0, 1, "x"), (1, 1, "y")]
    assert (logged.attempts, logged.reason) == (2, "length")
    ignored = ledger.ignored
    assert (ignored.acceptances, ignored.starts, ignored.tokens, ignored.ends) == (1, 1, 2, 2)
    assert ignored.last_ns == 11


@pytest.mark.anyio
async def test_the_expected_answer_is_the_engines() -> None:
    """Check the text of each token and the prompt's size; 64 tokens include the bytes of an emoji."""
    whole = await answer("What is an octopus, 水?", seed=7, max_tokens=64)
    begun = await answer("What is an octopus, 水?", seed=7, max_tokens=20)
    assert whole.pieces[:19] == begun.pieces[:19]
    assert whole.prompt_tokens == 6
    assert "" in whole.pieces
    assert (await answer("What is an octopus, 水?", seed=8, max_tokens=20)).pieces != begun.pieces
