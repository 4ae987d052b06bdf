"""The charge table, every row, from the events that lead to it."""

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from events.lifecycle import NEW, Life, advance
from events.pricing import charge_nanousd, is_chargeable
from events.schema import (
    AttemptReleased,
    AttemptStarted,
    CancelReason,
    CancelRequested,
    FinishReason,
    Parameters,
    Price,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)

PRICE = Price(model="m", prompt_nanousd=100, output_nanousd=350)
PROMPT_TOKENS, LOGGED = 11, 4
WHOLE_NANOUSD = 11 * 100 + 4 * 350

ACCEPTED = RequestAccepted(
    request="r",
    account="a",
    key="k",
    model="m",
    kind="chat",
    input="p",
    parameters=Parameters(),
    stream=True,
    prompt_tokens_max=64,
    deadline_ms=1000,
    price_version=1,
)


def started(attempt: str, after: str | None = None, resume: int = 0) -> AttemptStarted:
    return AttemptStarted(
        request="r",
        attempt=attempt,
        after=after,
        resume_index=resume,
        worker="w",
        prompt_tokens=PROMPT_TOKENS,
        accepted_at_ns=1,
        engine="sim",
        model_digest="d",
        delivery="",
    )


def tokens(attempt: str, index: int, count: int) -> TokensGenerated:
    return TokensGenerated(attempt=attempt, index=index, token_ids=(1,) * count, text="")


def ended(reason: Any, attempt: str | None = "x", count: int = LOGGED) -> RequestFinished:
    return RequestFinished(request="r", attempt=attempt, reason=reason, output_tokens=count)


def cancel(why: Any) -> CancelRequested:
    return CancelRequested(request="r", why=why)


START, ANSWER, LOST = started("x"), tokens("x", 0, LOGGED), AttemptReleased(attempt="x", why="lost")
RUN = (START, ANSWER)
# Two more tokens of an attempt that lost its worker; its successor logs the rest again.
FAILOVER = (START, tokens("x", 0, 2), started("y", "x", 2), tokens("x", 2, 2), tokens("y", 2, 2))

ROWS: list[tuple[str, tuple[Any, ...], int]] = [
    ("stop", (*RUN, ended("stop")), WHOLE_NANOUSD),
    ("length", (*RUN, ended("length")), WHOLE_NANOUSD),
    ("tool call", (*RUN, ended("tool_calls")), WHOLE_NANOUSD),
    ("stop without a token", (START, ended("stop", count=0)), 0),
    ("cancelled by the client after tokens", (*RUN, cancel("client"), ended("cancelled")), WHOLE_NANOUSD),
    ("cancelled, then let go", (*RUN, cancel("client"), LOST), WHOLE_NANOUSD),
    ("cancelled between attempts", (*RUN, LOST, cancel("client")), WHOLE_NANOUSD),
    ("disconnected after tokens", (*RUN, cancel("disconnect"), ended("cancelled")), WHOLE_NANOUSD),
    (
        "tokens between cancel and end",
        (START, cancel("client"), ANSWER, ended("cancelled")),
        WHOLE_NANOUSD,
    ),
    ("cancelled in the queue", (cancel("client"),), 0),
    ("cancelled before the first token", (START, cancel("client"), ended("cancelled", count=0)), 0),
    ("revoked in the queue", (cancel("revoked"),), 0),
    ("revoked before the first token", (START, cancel("revoked"), ended("revoked", count=0)), 0),
    ("expired before the first token", (START, ended("expired", count=0)), 0),
    ("expired in the queue, by control", (ended("expired", None),), 0),
    ("invalid", (START, ended("invalid", count=0)), 0),
    ("invalid after tokens", (*RUN, ended("invalid")), 0),
    ("expired by its worker after tokens", (*RUN, ended("expired")), WHOLE_NANOUSD),
    ("revoked after tokens", (*RUN, cancel("revoked"), ended("revoked")), WHOLE_NANOUSD),
    ("unanswered, in the queue", (cancel("unanswered"),), 0),
    ("unanswered, after tokens", (*RUN, cancel("unanswered"), ended("cancelled")), 0),
    ("unanswered, but it ended normally before", (*RUN, cancel("unanswered"), ended("stop")), 0),
    ("ended by control after tokens", (*RUN, ended("expired", None)), 0),
    ("cancelled, and ended by control", (*RUN, cancel("client"), ended("cancelled", None)), 0),
    ("engine error after tokens", (*RUN, ended("failed")), 0),
    ("failed by control", (*RUN, LOST, ended("failed", None)), 0),
    ("poison", (*RUN, ended("poison")), 0),
    ("poison by control", (*RUN, ended("poison", None)), 0),
    ("failover: nothing is charged twice", (*FAILOVER, ended("stop", "y")), WHOLE_NANOUSD),
    ("failover: the end of the lost attempt does not count", (*FAILOVER, ended("stop", "x")), 0),
]


def fold(*events: Any) -> Life:
    life = NEW
    for event in (ACCEPTED, *events):
        life = advance(life, event)
    return life


@pytest.mark.parametrize(("name", "events", "nanousd"), ROWS, ids=[row[0] for row in ROWS])
def test_row(name: str, events: tuple[Any, ...], nanousd: int) -> None:
    life = fold(*events)
    assert charge_nanousd(life, PRICE) == nanousd
    assert is_chargeable(life) is (nanousd > 0)


def test_nothing_is_charged_before_the_end() -> None:
    assert charge_nanousd(fold(*RUN), PRICE) == 0


def test_a_free_model_is_chargeable_and_costs_nothing() -> None:
    life = fold(*RUN, ended("stop"))
    assert is_chargeable(life)
    assert charge_nanousd(life, Price(model="m", prompt_nanousd=0, output_nanousd=0)) == 0


def test_large_charges_are_exact() -> None:
    million = fold(START, tokens("x", 0, 1_000_000), ended("stop", count=1_000_000))
    price = Price(model="m", prompt_nanousd=10**12 + 1, output_nanousd=10**12 + 3)
    assert charge_nanousd(million, price) == 11 * (10**12 + 1) + 10**6 * (10**12 + 3)


# The table as a person would read it: by reason, ender and the cancel that counted.
CHARGED_REASONS = ("stop", "length", "tool_calls", "cancelled", "revoked", "expired")
ends = st.builds(
    Life,
    phase=st.just("ended"),
    reason=st.sampled_from(get_args(FinishReason)),
    ender=st.sampled_from(("worker", "control", "fold")),
    wanted=st.sampled_from((None, *get_args(CancelReason))),
    prompt_tokens=st.integers(0, 10_000),
    next_index=st.integers(0, 10_000),
)
prices = st.builds(
    Price,
    model=st.just("m"),
    prompt_nanousd=st.integers(0, 10**12),
    output_nanousd=st.integers(0, 10**12),
    cached_prompt_nanousd=st.none() | st.integers(0, 10**12),
)


@given(life=ends, price=prices, cached=st.integers(0, 20_000), with_prompt=st.booleans())
def test_every_end_is_charged_by_the_table(life: Life, price: Price, cached: int, with_prompt: bool) -> None:
    charge = charge_nanousd(life, price, cached_tokens=cached, with_prompt=with_prompt)
    ours = life.reason in ("invalid", "failed", "poison")
    if ours or life.ender == "control" or life.wanted == "unanswered" or not life.next_index:
        assert charge == 0
        return
    assert life.reason in CHARGED_REASONS
    output = life.next_index * price.output_nanousd
    prompt = 0
    if with_prompt:
        cheap = min(cached, life.prompt_tokens) if price.cached_prompt_nanousd is not None else 0
        prompt = (life.prompt_tokens - cheap) * price.prompt_nanousd + cheap * (
            price.cached_prompt_nanousd or 0
        )
    assert charge == prompt + output


@given(life=ends, price=prices)
def test_nothing_is_charged_of_what_was_not_logged(life: Life, price: Price) -> None:
    more = replace(life, next_index=life.next_index + 1)
    assert charge_nanousd(more, price) >= charge_nanousd(life, price)
    assert charge_nanousd(replace(life, phase="open"), price) == 0
