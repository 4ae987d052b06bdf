"""The highest cost of a request, and its metered cost."""

from typing import Any

import pytest
from msgspec.structs import replace

from events.lifecycle import NEW, advance
from events.schema import (
    AttemptStarted,
    FinishReason,
    Message,
    Parameters,
    Price,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)
from rift.gateway.admission import max_cost
from rift.gateway.admission.credit_hold import MeteredCompletion
from tests.simulation.prepaid import ACCOUNT, PRICE
from tests.simulation.processes import MODEL


def accepted(**fields: Any) -> RequestAccepted:
    given = {"kind": "inference", "input": "wörd", "parameters": Parameters(), "prompt_tokens_max": 8192}
    return RequestAccepted(
        request="r", account=ACCOUNT, key="key", model=MODEL, stream=False, deadline_ms=600_000,
        price_version=1, **(given | fields),
    )  # fmt: skip


def test_a_prompt_has_at_most_one_token_per_byte_and_those_of_the_template() -> None:
    assert max_cost.prompt_tokens(accepted()) == 512 + 64 + 5
    assert max_cost.prompt_tokens(accepted(parameters=Parameters(raw=True))) == 16 + 5
    assert max_cost.prompt_tokens(accepted(kind="completion")) == 16 + 5
    assert max_cost.prompt_tokens(accepted(prompt_tokens_max=100)) == 100
    two = (Message(role="user", content="ab"), Message(role="assistant", content="cde"))
    assert max_cost.prompt_tokens(accepted(kind="chat", input=two)) == 512 + 2 * 64 + 5


def test_each_prompt_has_a_bound_of_its_own() -> None:
    pair = tuple(accepted(kind="completion", group="r", choice=choice) for choice in (0, 1))
    other = replace(accepted(kind="completion", input="another"), request="other")
    bounded = max_cost.bounded((*pair, other))
    assert [one.prompt_tokens_max for one in bounded] == [16 + 5, 16 + 5, 16 + 7]
    assert [one.choice for one in bounded] == [0, 1, 0]


def test_the_highest_cost_is_all_tokens_or_all_seconds() -> None:
    price = Price(model=MODEL, prompt_nanousd=2, output_nanousd=3, second_nanousd=7)
    short = accepted(prompt_tokens_max=100)
    assert max_cost.nanousd((short,), price) == 100 * 2 + 1024 * 3
    assert max_cost.nanousd((accepted(parameters=Parameters(max_tokens=10)),), price) == 8192 * 2 + 10 * 3
    assert max_cost.nanousd((accepted(plan="per_second"),), price) == 610 * 7
    assert max_cost.nanousd((replace(short, group="r"),) * 3, price) == 100 * 2 + 3 * 1024 * 3
    two = (short, replace(short, request="other", prompt_tokens_max=50))
    assert max_cost.nanousd(two, price) == 150 * 2 + 2 * 1024 * 3
    assert max_cost.nanousd((accepted(plan="per_second"),) * 3, price) == 610 * 7
    dear = replace(price, cached_prompt_nanousd=5)
    assert max_cost.nanousd((short,), dear) == 100 * 5 + 1024 * 3


@pytest.mark.parametrize(("reason", "charged_seconds"), [("stop", 5), ("cancelled", 5), ("failed", 0)])
def test_the_silence_after_a_lost_attempt_is_not_metered(reason: FinishReason, charged_seconds: int) -> None:
    answer = MeteredCompletion(accepted(plan="per_second", group="r"), PRICE)
    life = NEW
    second = 1_000_000_000
    for at_ns, event in (
        (0, answer.accepted),
        (10 * second, started("a", None)),
        (12 * second + 1, TokensGenerated(attempt="a", index=0, token_ids=(1,), text="x")),
        (90 * second, started("b", "a", resume_index=1)),
        (91 * second, TokensGenerated(attempt="b", index=1, token_ids=(1,), text="x")),
        (92 * second, RequestFinished(request="r", attempt="b", reason=reason, output_tokens=2)),
    ):
        assert answer.charge() is None
        life = advance(life, event)
        answer.add(event, life, at_ns)
    assert answer.attempts == [(10 * second, 12 * second + 1), (90 * second, 92 * second)]
    assert answer.ran == (answer.attempts if charged_seconds else [])
    assert answer.nanousd(with_prompt=True) == 0
    assert answer.seconds == 3 + 2
    assert PRICE.second_nanousd
    assert answer.charge() == {"at_most_nanousd": charged_seconds * PRICE.second_nanousd, "final": False}


def started(attempt: str, after: str | None, resume_index: int = 0) -> AttemptStarted:
    return AttemptStarted(
        request="r", attempt=attempt, after=after, resume_index=resume_index, worker="w", prompt_tokens=4,
        accepted_at_ns=0, engine="sim", model_digest="d", delivery="ack",
    )  # fmt: skip
