"""The actions that are due, moment by moment."""

import pytest
from msgspec.structs import replace

from events import codec, ids, subjects
from events.log import Stored
from events.schema import (
    AnyEvent,
    AttemptReleased,
    AttemptStarted,
    CancelRequested,
    ClientAttached,
    KeyRevoked,
    LaneLost,
    LaneReported,
    Parameters,
    ReplicaLost,
    ReplicaReady,
    ReplicaStarting,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)
from rift.control.duties.supervision import AttemptRelease, Redelivery, Supervision

SECOND = 1_000_000_000
AT = subjects.Address(0, "lane1234", "m")


class Story:
    """The events of one request, with its lane alive."""

    def __init__(self, **accepted: object) -> None:
        self.watch = Supervision()
        self.now_ns = 1_000 * SECOND
        self.sequence = 0
        self.request = ids.new_request_id(
            secret=b"s" * 32, account="dev", at=AT, floor=0, entropy=b"0123456789"
        )
        event = RequestAccepted(
            request=self.request,
            account="dev",
            key="k",
            model="m",
            kind="inference",
            input="hello",
            parameters=Parameters(),
            stream=True,
            prompt_tokens_max=10,
            deadline_ms=600_000,
            price_version=1,
            **accepted,
        )
        self.accepted = event
        self.tell(event)

    def tell(self, *events: object) -> None:
        for event in events:
            self.sequence += 1
            self.watch.fold_request(event, AT, self.sequence, self.now_ns)

    def fleet(self, *events: AnyEvent) -> None:
        self.sequence += 1
        data = codec.encode("fleet", events)
        self.watch.replicas.fold(Stored(subjects.fleet("m"), self.sequence, self.now_ns, data))

    def start(self, attempt: str = "a", after: str | None = None, index: int = 0) -> None:
        self.tell(
            AttemptStarted(
                request=self.request,
                attempt=attempt,
                after=after,
                resume_index=index,
                worker=f"worker-of-{attempt}",
                prompt_tokens=100,
                accepted_at_ns=0,
                engine="sim",
                model_digest="",
                delivery=f"ack-of-{attempt}",
            )
        )

    def after(self, seconds: float, *, lane_lives: bool = True) -> list[object]:
        self.now_ns += int(seconds * SECOND)
        if lane_lives:
            self.watch.fold_lane(LaneReported(lane=AT.lane), self.now_ns)
        return self.watch.due(self.now_ns)


def test_a_healthy_request_needs_no_action() -> None:
    story = Story()
    assert story.after(1) == []
    story.start()
    for index in range(100):
        story.tell(TokensGenerated(attempt="a", index=index, token_ids=(1,), text="x"))
        assert story.after(5) == []
    story.tell(RequestFinished(request=story.request, attempt="a", reason="stop", output_tokens=100))
    assert story.after(10_000) == []
    assert len(story.watch) == 0


@pytest.mark.parametrize("request_id", ["x\r\nPUB a 0", "", None])
def test_a_forged_acceptance_is_of_no_request(request_id: str | None) -> None:
    story = Story()
    at = AT if request_id is not None else subjects.Address(1, AT.lane, AT.model)
    forged = replace(story.accepted, request=story.request if request_id is None else request_id)
    watch = Supervision()
    watch.fold_request(forged, at, 1, 0)
    assert len(watch) == 0


@pytest.mark.parametrize(("cause", "why"), [("host", "host"), ("engine", "lost")])
@pytest.mark.parametrize("lost_first", [False, True])
def test_a_lost_replicas_attempt_is_released_at_once(cause: str, why: str, lost_first: bool) -> None:
    story = Story()
    story.fleet(starting("worker-of-a"), ready("worker-of-a"))
    lost = ReplicaLost(replica="worker-of-a", model="m", cause=cause)
    if lost_first:
        story.fleet(lost)
    story.start()
    if not lost_first:
        assert story.after(0) == []
        story.fleet(lost)
    (due,) = story.after(0)
    assert due == AttemptRelease(AT, AttemptReleased(attempt="a", why=why), "ack-of-a")
    assert story.after(0.5) == [], "said once, until the log had time to answer"
    assert story.after(2) == [due], "and again if it was not heard"
    story.tell(due.event)
    assert story.after(3) == []


def test_a_replica_restarted_under_a_lost_ones_name_keeps_its_attempts() -> None:
    story, again = Story(), "worker-of-a"
    story.fleet(starting(again), ready(again))
    story.start()
    story.fleet(ReplicaLost(replica=again, model="m", cause="engine"))
    assert story.after(1) != []
    story.fleet(starting(again), ready(again))
    assert story.after(3) != [], "attempts on the earlier replica are still lost"
    story.tell(AttemptReleased(attempt="a", why="lost"))
    story.start(after="a")
    assert story.after(3) == []


def starting(replica: str) -> ReplicaStarting:
    return ReplicaStarting(replica=replica, model="m", engine="sim")


def ready(replica: str) -> ReplicaReady:
    return ReplicaReady(replica=replica, model="m", slots=1, start_ns=1)


def fails(story: Story, times: int, *, model: str = "m") -> None:
    for number in range(times):
        name = f"{story.sequence}-{number}"
        story.now_ns += SECOND
        story.fleet(
            ReplicaStarting(replica=name, model=model, engine="sim"),
            ReplicaLost(replica=name, model=model, why="no weights"),
        )


def test_waiting_requests_end_after_three_failed_starts() -> None:
    story = Story()
    fails(story, 2)
    fails(story, 5, model="another")
    assert story.after(1) == []
    fails(story, 1)
    (due,) = story.after(1)
    assert isinstance(due, RequestFinished)
    assert (due.request, due.attempt, due.reason) == (story.request, None, "failed")
    assert due.error is not None
    assert due.error.code == "model_unavailable"
    assert due.error.message == (
        "m does not start: 3 starts failed in a row; the operator's `rift status` shows why"
    )


def test_a_request_after_three_failed_starts_waits_for_one_more() -> None:
    story = Story()
    story.watch = Supervision()
    fails(story, 3)
    story.now_ns += SECOND
    story.tell(story.accepted)
    assert story.after(100) == []
    fails(story, 1)
    assert [type(due) for due in story.after(1)] == [RequestFinished]


def test_a_successful_start_resets_the_failures() -> None:
    story = Story()
    fails(story, 2)
    story.fleet(starting("good"), ready("good"), ReplicaLost(replica="good", model="m"))
    fails(story, 2)
    assert story.after(1) == []


def test_failed_starts_do_not_end_requests_that_a_replica_serves() -> None:
    story = Story()
    story.fleet(starting("good"), ready("good"))
    fails(story, 3)
    assert story.after(1) == []
    story = Story()
    story.start()
    fails(story, 3)
    assert story.after(1) == [], "it runs"
    story.tell(AttemptReleased(attempt="a", why="host"))
    assert story.after(1) == [], "it has waited for no start that failed"
    fails(story, 1)
    assert [type(due) for due in story.after(1)] == [RequestFinished]


def test_an_untaken_released_request_is_redelivered_with_growing_waits() -> None:
    story = Story()
    story.start()
    story.tell(AttemptReleased(attempt="a", why="host"))
    assert story.after(9) == []
    assert story.after(2) == [Redelivery(AT, 1)]
    assert story.after(5) == []
    assert story.after(10) == [Redelivery(AT, 1)]
    story.start("b", after="a")
    assert story.after(30) == []


def test_a_queued_request_is_redelivered_after_five_minutes() -> None:
    story = Story()
    assert story.after(299) == []
    assert story.after(2) == [Redelivery(AT, 1)]


def test_a_stalled_attempt_is_released_after_the_time_to_read_its_prompt() -> None:
    story = Story()
    story.start()
    assert story.after(61) == [], "100 prompt tokens allow 2 s more"
    (due,) = story.after(2)
    assert due.event.why == "stalled"


def test_the_time_of_an_outage_of_the_log_is_nobodys_silence() -> None:
    story = Story()
    story.start()
    for _ in range(20):
        assert story.after(9, lane_lives=False) == []
        story.watch.note_outage(story.now_ns)
    assert story.after(9, lane_lives=False) == []
    assert story.after(2, lane_lives=False) == [LaneLost(lane=AT.lane)]
    assert story.after(50) == []
    (due,) = story.after(2)
    assert due.event.why == "stalled"


def test_an_unanswered_cancellation_is_carried_out_after_10_s() -> None:
    story = Story()
    story.start()
    story.tell(CancelRequested(request=story.request, why="client"))
    assert story.after(9) == []
    (due,) = story.after(2)
    assert isinstance(due, RequestFinished)
    assert (due.reason, due.attempt, due.output_tokens) == ("cancelled", None, 0)


def test_a_deadline_that_passed_ends_the_request() -> None:
    story = Story()
    assert [type(due) for due in story.after(604)] == [Redelivery]
    (due,) = story.after(3)
    assert due.reason == "expired"


def test_a_lane_that_reports_again_was_not_lost() -> None:
    story = Story()
    story.start()
    (lost,) = story.after(11, lane_lives=False)
    story.watch.fold_lane(lost, story.now_ns)
    for _ in range(10):
        assert story.after(5) == []


def test_a_late_repeat_of_an_acceptance_opens_nothing() -> None:
    story = Story()
    story.start()
    story.tell(RequestFinished(request=story.request, attempt="a", reason="stop", output_tokens=0))
    story.tell(story.accepted)
    assert len(story.watch) == 0
    assert story.after(500) == []


def test_a_lane_is_declared_lost_until_the_log_has_the_event() -> None:
    story = Story(detached=True)
    (lost,) = story.after(11, lane_lives=False)
    assert lost == LaneLost(lane=AT.lane)
    assert story.after(1, lane_lives=False) == []
    assert story.after(2, lane_lives=False) == [lost]
    story.watch.fold_lane(lost, story.now_ns)
    assert story.after(5, lane_lives=False) == []


@pytest.mark.parametrize("detached", [False, True])
def test_a_lost_lanes_request_ends_unless_a_client_attached_or_it_is_detached(detached: bool) -> None:
    story = Story(detached=detached)
    story.start()
    (lost,) = story.after(11, lane_lives=False)
    assert lost == LaneLost(lane=AT.lane)
    story.watch.fold_lane(lost, story.now_ns)
    story.after(10, lane_lives=False)
    story.watch.fold_lane(ClientAttached(request=story.request), story.now_ns)
    assert story.after(10, lane_lives=False) == []
    found = story.after(10, lane_lives=False)
    assert [due.reason for due in found] == ([] if detached else ["cancelled"])


def test_requests_under_a_revoked_key_are_cancelled_until_the_log_has_the_event() -> None:
    story = Story()
    story.start()
    story.watch.fold_book(KeyRevoked(id="other", key="other", account="dev"))
    assert story.after(1) == []
    story.watch.fold_book(KeyRevoked(id="r", key="k", account="dev"))
    wanted = CancelRequested(request=story.request, why="revoked")
    assert story.after(1) == [wanted]
    assert story.after(1) == []
    assert story.after(2) == [wanted]
    story.tell(wanted)
    assert story.after(5) == []
    (end,) = story.after(6)
    assert isinstance(end, RequestFinished)
    assert end.reason == "revoked"


def test_a_request_accepted_under_a_revoked_key_is_cancelled_too() -> None:
    watch = Story().watch
    watch.fold_book(KeyRevoked(id="r", key="k", account="dev"))
    assert [type(due) for due in watch.due(1_001 * SECOND)] == [CancelRequested]
