"""The protocol of `events/lifecycle.py` under random schedules, and mutants that the model must catch."""

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from events.ids import new_request_id
from events.lifecycle import Life, advance
from events.request_states import RequestStates
from events.schema import (
    AttemptReleased,
    AttemptStarted,
    CancelRequested,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)
from tests.simulation.promise import Violation
from tests.simulation.protocol_model import AT, run

SCHEDULES = 6000

# The model must catch each mutant within this many schedules.
CAUGHT_WITHIN = 2000


def test_every_schedule_keeps_the_promises_and_together_they_are_eventful() -> None:
    attempts = ignored = superseded = cancelled = 0
    for seed in range(SCHEDULES):
        schedule = run(seed)
        attempts += len(schedule.attempts)
        ignored += len(schedule.log) - schedule.life.counted
        superseded += len(schedule.oracle.chain) > 1
        cancelled += schedule.life.reason == "cancelled"
    assert attempts > 2 * SCHEDULES
    assert ignored > 20 * SCHEDULES
    assert superseded > SCHEDULES / 3
    assert SCHEDULES / 10 < cancelled < SCHEDULES / 2


def test_readers_of_many_requests_agree_with_the_fold_of_each() -> None:
    """Requests share a log; readers begin to follow them at any position, and forget them again."""
    for seed in range(200):
        schedules = [run(1000 * seed + each) for each in range(3)]
        chance = schedules[0].chance
        requests = [
            new_request_id(secret=b"s" * 32, account="a", at=AT, floor=0, entropy=b"%010d" % each)
            for each in range(3)
        ]
        logs = [
            [_of(request, each, event) for event in schedule.log]
            for each, (request, schedule) in enumerate(zip(requests, schedules, strict=True))
        ]
        lives = RequestStates()
        for request in requests:
            lives.follow(request)
        while any(logs):
            each = chance.choice([each for each, log in enumerate(logs) if log])
            lives.fold(logs[each].pop(0), AT)
            if chance.random() < 0.05:
                life = lives[requests[each]]
                lives.forget(requests[each])
                lives.follow(requests[each], life)
        for each, schedule in enumerate(schedules):
            theirs = lives[requests[each]]
            assert theirs.counted == schedule.life.counted, f"seed {seed}"
            assert (theirs.reason, theirs.next_index) == (schedule.life.reason, schedule.life.next_index)


def _of(request: str, each: int, event: Any) -> Any:
    """Return the event with the ids of another request."""
    changes = {"request": request} if hasattr(event, "request") else {}
    for field in ("attempt", "after"):
        if getattr(event, field, None) is not None:
            changes[field] = f"{getattr(event, field)}of{each}"
    return replace(event, **changes)


# --- mutants: each is the real table with one rule broken ----------------------------------------


def ignores_after(life: Life, event: Any) -> Life:
    return advance(life, replace(event, after=life.attempt) if isinstance(event, AttemptStarted) else event)


def ignores_resume_index(life: Life, event: Any) -> Life:
    if isinstance(event, AttemptStarted):
        event = replace(event, resume_index=life.next_index)
    return advance(life, event)


def counts_a_repeated_start(life: Life, event: Any) -> Life:
    if isinstance(event, AttemptStarted) and event.attempt == life.attempt:
        event = replace(event, after=life.attempt, resume_index=life.next_index)
        life = replace(life, seen=frozenset())
    return advance(life, event)


def counts_after_a_gap(life: Life, event: Any) -> Life:
    if isinstance(event, TokensGenerated) and event.index > life.next_index:
        event = replace(event, index=life.next_index)
    return advance(life, event)


def counts_a_repeat(life: Life, event: Any) -> Life:
    if isinstance(event, TokensGenerated) and event.index < life.next_index:
        event = replace(event, index=life.next_index)
    return advance(life, event)


def counts_tokens_of_a_superseded_attempt(life: Life, event: Any) -> Life:
    if isinstance(event, TokensGenerated) and event.attempt in life.seen:
        return replace(advance(replace(life, attempt=event.attempt), event), attempt=life.attempt)
    return advance(life, event)


def counts_tokens_after_a_release(life: Life, event: Any) -> Life:
    if isinstance(event, TokensGenerated) and life.phase == "open" and event.attempt == life.attempt:
        return replace(advance(replace(life, live=True), event), live=life.live)
    return advance(life, event)


def counts_a_finish_with_another_count(life: Life, event: Any) -> Life:
    if isinstance(event, RequestFinished):
        event = replace(event, output_tokens=life.next_index)
    return advance(life, event)


def counts_a_finish_of_an_older_attempt_with_an_equal_count(life: Life, event: Any) -> Life:
    if isinstance(event, RequestFinished) and event.attempt in life.seen:
        event = replace(event, attempt=life.attempt)
    return advance(life, event)


def counts_a_word_to_one_attempt_as_a_cancel(life: Life, event: Any) -> Life:
    return advance(life, replace(event, attempt=None) if isinstance(event, CancelRequested) else event)


def counts_a_release_of_an_older_attempt(life: Life, event: Any) -> Life:
    if isinstance(event, AttemptReleased) and event.attempt in life.seen and life.attempt is not None:
        event = replace(event, attempt=life.attempt)
    return advance(life, event)


def begins_again_with_a_second_acceptance(life: Life, event: Any) -> Life:
    if isinstance(event, RequestAccepted) and life.phase == "open":
        return replace(life, attempt=None, live=False, counted=life.counted + 1)
    return advance(life, event)


def ends_twice(life: Life, event: Any) -> Life:
    if isinstance(event, RequestFinished) and life.phase == "ended":
        life = replace(life, phase="open")
    return advance(life, event)


def drops_a_chunk(life: Life, event: Any) -> Life:
    if isinstance(event, TokensGenerated) and event.index == 5:
        return life
    return advance(life, event)


def bills_what_control_says(life: Life, event: Any) -> Life:
    after = advance(life, event)
    if after is not life and isinstance(event, RequestFinished) and event.attempt is None:
        after = replace(after, next_index=event.output_tokens)
    return after


def forgets_a_wanted_cancel(life: Life, event: Any) -> Life:
    after = advance(life, event)
    if isinstance(event, AttemptReleased) and life.wanted and after is not life:
        return replace(life, live=False, wanted=None, counted=life.counted + 1, released=event.why)
    return after


def counts_no_deaths(life: Life, event: Any) -> Life:
    return replace(advance(life, event), deaths=0)


MUTANTS: list[Callable[[Life, Any], Life]] = [
    ignores_after,
    ignores_resume_index,
    counts_a_repeated_start,
    counts_after_a_gap,
    counts_a_repeat,
    counts_tokens_of_a_superseded_attempt,
    counts_tokens_after_a_release,
    counts_a_finish_with_another_count,
    counts_a_finish_of_an_older_attempt_with_an_equal_count,
    counts_a_word_to_one_attempt_as_a_cancel,
    counts_a_release_of_an_older_attempt,
    begins_again_with_a_second_acceptance,
    ends_twice,
    drops_a_chunk,
    bills_what_control_says,
    forgets_a_wanted_cancel,
    counts_no_deaths,
]


def run_many(schedules: int, mutant: Callable[[Life, Any], Life]) -> None:
    for seed in range(schedules):
        run(seed, mutant)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_model_catches(mutant: Callable[[Life, Any], Life]) -> None:
    with pytest.raises(Violation):
        run_many(CAUGHT_WITHIN, mutant)


def test_a_violation_prints_the_command_that_repeats_it() -> None:
    with pytest.raises(Violation, match=r"repeat it with: python -m tests.simulation.protocol_model \d+"):
        run_many(CAUGHT_WITHIN, counts_a_repeat)
