"""The table of `events/lifecycle.py`, row by row: which event counts in which state."""

from typing import Any

import pytest
from msgspec.structs import replace

from events.lifecycle import NEW, Life, advance
from events.schema import (
    AttemptReleased,
    AttemptStarted,
    CancelRequested,
    ClientAttached,
    Parameters,
    Problem,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)

ACCEPTED = RequestAccepted(
    request="r",
    account="a",
    key="k",
    model="m",
    kind="inference",
    input="p",
    parameters=Parameters(),
    stream=True,
    prompt_tokens_max=8,
    deadline_ms=1000,
    price_version=1,
)


def started(
    attempt: str, after: str | None = None, resume: int = 0, prompt_tokens: int = 7
) -> AttemptStarted:
    return AttemptStarted(
        request="r",
        attempt=attempt,
        after=after,
        resume_index=resume,
        worker="w",
        prompt_tokens=prompt_tokens,
        accepted_at_ns=1,
        engine="sim",
        model_digest="d",
        delivery="",
    )


def tokens(attempt: str, index: int, count: int = 1) -> TokensGenerated:
    return TokensGenerated(attempt=attempt, index=index, token_ids=tuple(range(count)), text="x")


def released(attempt: str, why: Any = "draining") -> AttemptReleased:
    return AttemptReleased(attempt=attempt, why=why)


def cancel(attempt: str | None = None, why: Any = "client") -> CancelRequested:
    return CancelRequested(request="r", why=why, attempt=attempt)


def finished(attempt: str | None, count: int, reason: Any = "stop") -> RequestFinished:
    return RequestFinished(request="r", attempt=attempt, reason=reason, output_tokens=count)


def fold(*events: Any, life: Life = NEW) -> Life:
    for event in events:
        life = advance(life, event)
    return life


QUEUED = fold(ACCEPTED)
RUNNING = fold(started("a"), tokens("a", 0, 3), life=QUEUED)
SUCCEEDED = fold(started("b", after="a", resume=3), tokens("b", 3), life=RUNNING)
LET_GO = fold(released("a"), life=RUNNING)
WANTED = fold(cancel(), life=RUNNING)
ENDED = fold(finished("a", 3), life=RUNNING)

COUNTS = [
    ("acceptance opens", NEW, ACCEPTED, {"phase": "open", "attempt": None}),
    ("first start", QUEUED, started("a"), {"attempt": "a", "live": True, "attempts": 1, "prompt_tokens": 7}),
    ("start after a silent one", RUNNING, started("b", "a", 3), {"attempt": "b", "live": True, "deaths": 1}),
    ("start after a released one", LET_GO, started("b", "a", 3), {"attempt": "b", "live": True, "deaths": 0}),
    ("the first prompt is what counts", RUNNING, started("b", "a", 3, 99), {"prompt_tokens": 7}),
    ("tokens of the current attempt", RUNNING, tokens("a", 3, 2), {"next_index": 5}),
    ("tokens of the successor", SUCCEEDED, tokens("b", 4), {"next_index": 5}),
    ("release", RUNNING, released("a", "lost"), {"phase": "open", "live": False, "released": "lost"}),
    ("release of one to be cancelled", WANTED, released("a"), {"phase": "ended", "reason": "cancelled"}),
    ("cancel in the queue", QUEUED, cancel(), {"phase": "ended", "reason": "cancelled", "ender": "fold"}),
    ("cancel between attempts", LET_GO, cancel(), {"phase": "ended", "reason": "cancelled", "next_index": 3}),
    ("cancel of a running one", RUNNING, cancel(why="disconnect"), {"phase": "open", "wanted": "disconnect"}),
    ("revoked in the queue", QUEUED, cancel(why="revoked"), {"phase": "ended", "reason": "revoked"}),
    ("tokens after a wanted cancel", WANTED, tokens("a", 3), {"next_index": 4, "wanted": "client"}),
    ("the worker's end", RUNNING, finished("a", 3), {"phase": "ended", "reason": "stop", "ender": "worker"}),
    ("control's end", RUNNING, finished(None, 99, "expired"), {"ender": "control", "next_index": 3}),
    (
        "control's end in the queue",
        QUEUED,
        finished(None, 0, "failed"),
        {"phase": "ended", "reason": "failed"},
    ),
]

NOT = [
    ("a second acceptance", QUEUED, ACCEPTED),
    ("an acceptance after the end", ENDED, ACCEPTED),
    ("a start before the acceptance", NEW, started("a")),
    ("the second of two starts that name no attempt", RUNNING, started("b", None, 3)),
    ("a start behind", RUNNING, started("b", "a", 2)),
    ("a start ahead", RUNNING, started("b", "a", 4)),
    ("a repeated start", RUNNING, started("a", None, 0)),
    ("a start after the end", ENDED, started("b", "a", 3)),
    ("tokens without an attempt", QUEUED, tokens("a", 0)),
    ("tokens again", RUNNING, tokens("a", 0, 3)),
    ("tokens that overlap", RUNNING, tokens("a", 2, 3)),
    ("tokens behind a gap", RUNNING, tokens("a", 4)),
    ("tokens of a superseded attempt", SUCCEEDED, tokens("a", 4)),
    ("tokens of a released attempt", LET_GO, tokens("a", 3)),
    ("tokens after the end", ENDED, tokens("a", 3)),
    ("release of a superseded attempt", SUCCEEDED, released("a")),
    ("release again", LET_GO, released("a", "lost")),
    ("a cancel before the acceptance", NEW, cancel()),
    ("a second cancel", WANTED, cancel(why="revoked")),
    ("a word to one attempt", RUNNING, cancel("a", "superseded")),
    ("a word to an older attempt", SUCCEEDED, cancel("a", "superseded")),
    ("a cancel after the end", ENDED, cancel()),
    ("an end with fewer", RUNNING, finished("a", 2)),
    ("an end with more", RUNNING, finished("a", 4)),
    ("an end by a superseded attempt, count equal", SUCCEEDED, finished("a", 4)),
    ("an end by a released attempt", LET_GO, finished("a", 3)),
    ("an end before the acceptance", NEW, finished(None, 0)),
    ("a second end", ENDED, finished("a", 3, "length")),
    ("control after the end", ENDED, finished(None, 3, "expired")),
    ("not an event of a life", RUNNING, ClientAttached(request="r")),
]


@pytest.mark.parametrize(("name", "life", "event", "effect"), COUNTS, ids=[row[0] for row in COUNTS])
def test_counts(name: str, life: Life, event: Any, effect: dict[str, Any]) -> None:
    after = advance(life, event)
    assert after.counted == life.counted + 1
    assert {field: getattr(after, field) for field in effect} == effect


@pytest.mark.parametrize(("name", "life", "event"), NOT, ids=[row[0] for row in NOT])
def test_does_not_count(name: str, life: Life, event: Any) -> None:
    after = advance(life, event)
    assert replace(after, seen=life.seen) == life


def test_a_start_that_did_not_count_cannot_count_later() -> None:
    early = fold(started("b", "a", 3), life=QUEUED)
    late = fold(started("a"), tokens("a", 0, 3), started("b", "a", 3), life=early)
    assert late.attempt == "a"


def test_deaths_are_attempts_that_were_succeeded_and_not_let_go() -> None:
    life = fold(started("a"), released("a", "host"), started("b", "a"), started("c", "b"), life=QUEUED)
    assert (life.attempts, life.deaths) == (3, 1)
    life = fold(
        released("c", "lost"), started("d", "c"), released("d", "stalled"), started("e", "d"), life=life
    )
    assert (life.attempts, life.deaths) == (5, 3)


def test_the_end_keeps_its_problem() -> None:
    problem = Problem(code="engine_failed", message="it stopped")
    ended = advance(RUNNING, replace(finished("a", 3, "failed"), error=problem))
    assert (ended.reason, ended.error) == ("failed", problem)


def test_a_release_ends_what_was_revoked_as_revoked() -> None:
    assert fold(cancel(why="revoked"), released("a"), life=RUNNING).reason == "revoked"


def test_what_was_cancelled_may_still_end_well_if_the_worker_was_first() -> None:
    assert fold(finished("a", 3, "stop"), life=WANTED).reason == "stop"
