"""The states of a subscription, with and without a client."""

import pytest

from events.lifecycle import Life
from events.schema import AttemptStarted, Parameters, Price, Problem, RequestAccepted, RequestFinished
from rift.gateway.completion import Completion
from rift.gateway.streams.client_buffer import BufferedBytes, ClientBuffer
from rift.gateway.streams.subscription import Subscription

pytestmark = pytest.mark.anyio

PRICE = Price(model="m", prompt_nanousd=1, output_nanousd=1)
STARTED = AttemptStarted(
    request="a", attempt="att", after=None, resume_index=0, worker="w", prompt_tokens=1, accepted_at_ns=1,
    engine="sim", model_digest="", delivery="",
)  # fmt: skip


def completion(request: str) -> Completion:
    accepted = RequestAccepted(
        request=request, account="a", key="k", model="m", kind="chat", input="hi", stream=False,
        parameters=Parameters(), prompt_tokens_max=8, deadline_ms=1000, price_version=1,
    )  # fmt: skip
    return Completion(accepted, PRICE, keep_text=False)


def client() -> ClientBuffer:
    return ClientBuffer(None, BufferedBytes())


def start(subscription: Subscription, request: str) -> None:
    subscription.push(request, STARTED, Life(phase="open", attempt="att", counted=2), 1)


def end(subscription: Subscription, request: str, reason: str = "length") -> None:
    finished = RequestFinished(request=request, attempt=None, reason=reason, output_tokens=0)  # type: ignore[arg-type]
    subscription.push(request, finished, Life(phase="ended", reason=reason, counted=3), 2)


async def test_it_ends_with_the_last_request_and_reports_that_once() -> None:
    ended: list[Subscription] = []
    subscription = Subscription([completion("a"), completion("b")], on_end=ended.append)
    assert subscription.state == "waiting"
    start(subscription, "a")
    assert subscription.state == "running"
    end(subscription, "a", "failed")
    assert (subscription.state, ended) == ("running", []), "without a client, one failure is no end"
    end(subscription, "b")
    end(subscription, "b")
    assert (subscription.state, ended) == ("ended", [subscription])
    assert [answer.id for answer in subscription.finished] == ["a", "b"]


async def test_with_a_client_the_first_failure_is_the_end_until_the_client_is_released() -> None:
    subscription = Subscription([completion("a"), completion("b")], client())
    end(subscription, "a", "failed")
    assert subscription.state == "ended"
    subscription.release_client()
    assert subscription.state == "running"
    end(subscription, "b")
    assert subscription.state == "ended"


async def test_only_a_client_can_be_broken_off() -> None:
    problem = Problem(code="slow", message="")
    watcher, subscription = Subscription([completion("a")]), Subscription([completion("a")], client())
    for each in (watcher, subscription):
        each.break_off(problem)
    assert (watcher.state, watcher.problem) == ("waiting", None)
    assert (subscription.state, subscription.problem) == ("broken", problem)
    end(subscription, "a")
    assert subscription.state == "broken"
    subscription.release_client()
    assert subscription.state == "ended"


def test_another_client_is_reported_once_and_at_once_if_it_was_first() -> None:
    subscription = Subscription([completion("a")], client())
    calls: list[str] = []
    subscription.at_attachment(lambda: calls.append("later"))
    assert not calls
    for _ in range(2):
        subscription.note_attachment()
    assert calls == ["later"]
    subscription.at_attachment(lambda: calls.append("at once"))
    assert calls == ["later", "at once"]


def test_a_client_that_left_is_told_of_no_other() -> None:
    subscription = Subscription([completion("a")], client())
    calls: list[str] = []
    subscription.at_attachment(lambda: calls.append("called"))
    subscription.at_attachment(None)
    subscription.note_attachment()
    assert not calls
