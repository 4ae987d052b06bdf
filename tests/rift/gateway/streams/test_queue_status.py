"""The status that a waiting client receives, and when it is sent."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from events import codec, subjects
from events.fleet import Fleet
from events.log import Stored
from events.schema import (
    AnyEvent,
    Parameters,
    ReplicaLost,
    ReplicaReady,
    ReplicaReported,
    ReplicaStarting,
    RequestAccepted,
    ScaleDecided,
)
from rift.gateway.streams.delivery import KEEP_ALIVE_S, STATUS_S, StatusNotices
from rift.gateway.streams.queue_status import (
    QueueDepth,
    QueueStatus,
    Status,
    status,
)

SECOND = 1_000_000_000


class Story:
    def __init__(self) -> None:
        self.fleet = Fleet()
        self.now_ns = 1_000 * SECOND

    def tell(self, event: AnyEvent, *, after_s: float = 0.0) -> None:
        self.now_ns += int(after_s * SECOND)
        data = codec.encode("test", [event])
        self.fleet.fold(Stored(subjects.fleet("m"), self.fleet.position + 1, self.now_ns, data))

    def status(self, *, after_s: float = 0.0) -> Status:
        self.now_ns += int(after_s * SECOND)
        return status(self.fleet, "m", self.now_ns)


def starting(replica: str) -> ReplicaStarting:
    return ReplicaStarting(replica=replica, model="m", engine="sim")


def ready(replica: str, start_s: float) -> ReplicaReady:
    return ReplicaReady(replica=replica, model="m", slots=1, start_ns=int(start_s * SECOND))


def decided(**inputs: int) -> ScaleDecided:
    return ScaleDecided(
        model="m",
        from_replicas=0,
        to_replicas=1,
        reason="",
        policy="",
        positions={},
        decided_at_ns=0,
        inputs=inputs,
    )


def test_starting_counts_down_from_the_measured_start_until_a_replica_is_ready() -> None:
    story = Story()
    assert story.status() == Status("starting"), "no start has been measured"
    story.tell(decided())
    story.tell(starting("a"), after_s=1)
    assert story.status(after_s=5) == Status("starting")
    # Sixty seconds after the decision; the worker itself took less.
    story.tell(ready("a", 40), after_s=54)
    assert story.status() == Status("queued")
    story.tell(ReplicaLost(replica="a", model="m"))
    assert story.status() == Status("starting", 60_000), "a start that has not begun takes the whole time"
    story.tell(starting("b"), after_s=10)
    story.tell(starting("c"), after_s=10)
    assert story.status(after_s=5.5) == Status("starting", 45_000), (
        "the earliest start counts, in whole seconds"
    )
    assert story.status(after_s=100) == Status("starting", 0), "an overdue start has no time left"
    story.tell(ready("c", 70))
    assert story.status() == Status("queued")


def test_before_any_start_the_estimate_is_that_of_the_decision() -> None:
    story = Story()
    story.tell(decided(**{"replicas.start_ns": 90 * SECOND}))
    assert story.status() == Status("starting", 90_000)


def test_a_status_is_sent_when_it_is_new_and_not_too_often() -> None:
    notices = StatusNotices()
    assert notices.is_due(Status("starting"), 0)
    assert not notices.is_due(Status("starting"), KEEP_ALIVE_S - 0.1)
    assert notices.is_due(Status("starting"), KEEP_ALIVE_S), "it is also a keep-alive"
    at = KEEP_ALIVE_S + 0.1
    assert not notices.is_due(Status("starting", 9_000), at), "the last one was just sent"
    assert notices.is_due(Status("starting", 8_000), at + STATUS_S)
    assert not notices.is_due(Status("starting", 7_000), at + STATUS_S + 0.5)
    assert notices.is_due(Status("queued"), at + STATUS_S + 0.6), "a different status is sent at once"


def test_clients_are_woken_when_a_model_becomes_ready_or_unready() -> None:
    woken: list[Any] = []

    story = Story()
    waiting = QueueStatus(story.fleet, woken.append, lambda: 0)

    def tell(event: AnyEvent) -> None:
        story.tell(event)
        waiting.refresh()

    tell(starting("a"))
    assert woken == []
    tell(ready("a", 1))
    assert woken == [{"m"}]
    tell(ReplicaReported(replica="a", model="m", running=1, waiting=0))
    assert woken == [{"m"}]
    tell(ReplicaLost(replica="a", model="m"))
    assert woken == [{"m"}] * 2


@pytest.mark.parametrize("now_ns", [0, 2_000 * SECOND])
def test_the_time_is_never_before_the_fleets_last_event(now_ns: int) -> None:
    story = Story()
    story.tell(decided(**{"replicas.start_ns": 10 * SECOND}))
    story.tell(starting("a"))
    waiting = QueueStatus(story.fleet, lambda models: None, lambda: now_ns)
    assert waiting.status("m") == Status("starting", 0 if now_ns else 10_000)


def accepted(number: int) -> RequestAccepted:
    return RequestAccepted(
        request=f"r{number}",
        account=f"account{number % 2}",
        key="k",
        model=f"m{number // 2 % 2}",
        kind="inference",
        input="x" * number,
        parameters=Parameters(),
        stream=True,
        prompt_tokens_max=10,
        deadline_ms=1,
        price_version=1,
    )


@given(
    st.lists(st.tuples(st.sampled_from(("add", "remove", "begin", "end")), st.integers(0, 5)), max_size=40)
)
def test_the_counts_of_a_queue_are_those_of_its_requests(steps: list[tuple[str, int]]) -> None:
    queue = QueueDepth()
    waiting: dict[str, RequestAccepted] = {}
    running: dict[str, RequestAccepted] = {}
    for step, number in steps:
        request = accepted(number)
        if step in ("add", "remove"):
            getattr(queue, step)([request])
        else:
            getattr(queue, step)(request)
        waiting.pop(request.request, None)
        if step == "add":
            waiting[request.request] = request
        if step in ("begin", "end"):
            running.pop(request.request, None)
        if step == "begin":
            running[request.request] = request
        for model in ("m0", "m1"):
            assert queue.running(model) == sum(one.model == model for one in running.values())
            for account in ("", "account0", "account1"):
                sizes = [
                    len(codec.encode_event(one))
                    for one in waiting.values()
                    if one.model == model and account in ("", one.account)
                ]
                assert queue.length(model, account) == (len(sizes), sum(sizes))
    for number in range(6):
        queue.end(accepted(number))
    assert not queue._waiting
    assert not queue._sizes
