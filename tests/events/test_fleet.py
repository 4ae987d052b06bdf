"""Which elections and decisions count, in every order, and for a reader that begins after a trim."""

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events import codec, subjects
from events.fleet import Fleet
from events.log import Stored
from events.schema import (
    ControlElected,
    ReplicaDraining,
    ReplicaLost,
    ReplicaReady,
    ReplicaReported,
    ReplicaStarting,
    ScaleDecided,
)

NAMES = ("control-a", "control-b", "control-c")
MODELS = ("m", "n")


def decided(before: int, now: int, *, epoch: int = 0, model: str = "m") -> ScaleDecided:
    return ScaleDecided(
        model=model,
        from_replicas=before,
        to_replicas=now,
        reason="",
        policy="",
        positions={},
        decided_at_ns=0,
        inputs={},
        epoch=epoch,
    )


def elected(epoch: int, control: str = "a") -> ControlElected:
    return ControlElected(epoch=epoch, control=control)


def stored(sequence: int, *events: Any) -> Stored:
    return Stored(subjects.LEADER, sequence, sequence, codec.encode("test", events))


def fold(messages: Iterable[Stored]) -> Fleet:
    fleet = Fleet()
    for message in messages:
        fleet.fold(message)
    return fleet


def counted(*events: Any) -> list[Any]:
    fleet = Fleet()
    return [event for number, event in enumerate(events, 1) for event in fleet.fold(stored(number, event))]


# --- what counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("events", "counts"),
    [
        ([elected(1), elected(1, "b"), elected(2, "b")], [0, 2]),
        ([elected(1), decided(0, 1, epoch=1), decided(0, 1, epoch=1), decided(1, 2, epoch=1)], [0, 1, 3]),
        ([elected(1), elected(2, "b"), decided(0, 1, epoch=1), decided(0, 1, epoch=2)], [0, 1, 3]),
        ([decided(0, 2), elected(1), decided(2, 3), decided(2, 3, epoch=1)], [0, 1, 3]),
        ([elected(1), decided(0, 1, epoch=1), decided(0, 1, epoch=1, model="n")], [0, 1, 2]),
    ],
)
def test_what_counts(events: list[Any], counts: list[int]) -> None:
    assert counted(*events) == [events[number] for number in counts]


def test_what_is_said_of_a_replica_that_ended_says_nothing() -> None:
    starting = ReplicaStarting(replica="r", model="m", engine="sim")
    reported = ReplicaReported(replica="r", model="m", running=0, waiting=0)
    ready = ReplicaReady(replica="r", model="m", slots=1, start_ns=1)
    lost = ReplicaLost(replica="r", model="m")
    draining = ReplicaDraining(replica="r", model="m")
    fleet = fold([stored(1, starting, reported)])
    assert fleet.replicas["m"]["r"].state == "starting", "it has only said that it lives"
    assert counted(starting, lost, reported, ready, draining, lost) == [starting, lost]
    assert fold([stored(1, starting, lost, reported, ready, draining)]).replicas == {"m": {}}


def test_a_start_lasts_from_its_decision_until_ready() -> None:
    def starting(name: str) -> ReplicaStarting:
        return ReplicaStarting(replica=name, model="m", engine="sim")

    def ready(name: str, start_ns: int) -> ReplicaReady:
        return ReplicaReady(replica=name, model="m", slots=1, start_ns=start_ns)

    lost = ReplicaLost(replica="a", model="m")
    story = [decided(0, 2), decided(2, 3), *map(starting, "abc"), *(ready(name, 2) for name in "abc")]
    fleet = fold(stored(number, event) for number, event in enumerate(story, 10))
    # Two were decided at 10 and one at 11; they were ready at 15, 16 and 17.
    assert fleet.starts["m"].took_ns == (5, 6, 6)
    assert fleet.began_at_ns("m") is None
    # One that replaces a lost one follows no decision.
    for number, event in enumerate((lost, starting("d"), ready("d", 1)), 20):
        fleet.fold(stored(number, event))
    assert fleet.starts["m"].took_ns[-1] == 1
    # A decision that is taken back before its replica has begun leaves nothing to wait for.
    for number, event in enumerate((decided(3, 5), decided(5, 4)), 30):
        fleet.fold(stored(number, event))
    assert fleet.began_at_ns("m") == 30
    fleet.fold(stored(40, decided(4, 3)))
    assert fleet.began_at_ns("m") is None


# --- every order --------------------------------------------------------------------------------------


class Race:
    """Control processes that read as far as they like, and then stand for election or decide.

    Their appends are stored at once or later.
    """

    def __init__(self) -> None:
        self.stream: list[Stored] = []
        self.whole = Fleet()
        self.read = {name: Fleet() for name in NAMES}
        self.under_way: list[tuple[str, Any]] = []
        self.needed: list[int] = []

    def step(self, name: str, doing: str, number: int) -> None:
        fleet = self.read[name]
        if doing == "read":
            for message in self.stream[fleet.position : fleet.position + number + 1]:
                fleet.fold(message)
        elif doing == "stand":
            self.send(name, elected(fleet.epoch + 1, name), is_late=number == 0)
        elif doing == "decide" and fleet.leader == name and not self.waits(name):
            model = MODELS[number % 2]
            before = fleet.wanted.get(model, 0)
            now = before + 1 if number % 3 else 0
            self.send(name, decided(before, now, epoch=fleet.epoch, model=model), is_late=number == 0)
        elif doing == "land" and self.under_way:
            self.land(*self.under_way.pop(number % len(self.under_way)))

    def waits(self, name: str) -> bool:
        """A process reads its own decision before it makes another, because each follows from the last."""
        mine = [s.sequence for s in self.stream if codec.decode(s.data)[0] == name]
        return any(writer == name for writer, _ in self.under_way) or self.read[name].position < max(
            mine, default=0
        )

    def send(self, name: str, event: Any, *, is_late: bool) -> None:
        if is_late:
            self.under_way.append((name, event))
        else:
            self.land(name, event)

    def land(self, name: str, event: Any) -> None:
        message = Stored(subjects.LEADER, len(self.stream) + 1, len(self.stream), codec.encode(name, [event]))
        leader, epoch, wanted = self.whole.leader, self.whole.epoch, dict(self.whole.wanted)
        self.stream.append(message)
        counts = bool(self.whole.fold(message))
        if isinstance(event, ControlElected):
            assert counts == (event.epoch == epoch + 1), "the first of the candidates"
            assert self.whole.leader == (name if counts else leader)
        elif counts:
            assert (name, event.epoch) == (leader, epoch), "the decision of one who does not lead"
            assert event.from_replicas == wanted.get(event.model, event.from_replicas)
        self.needed.append(self.whole.needed_from)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.sampled_from(["read", "read", "stand", "decide", "decide", "land"]),
        st.integers(0, 5),
    ),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(steps=STEPS, data=st.data())
def test_whatever_lands_when_one_leads_and_its_decisions_alone_count(
    steps: list[tuple[str, str, int]], data: Any
) -> None:
    race = Race()
    for step in steps:
        race.step(*step)
    for fleet in race.read.values():
        for message in race.stream[fleet.position :]:
            fleet.fold(message)
    # A reader that begins after any trim, at any time, arrives at the same state.
    when = data.draw(st.integers(0, len(race.stream)))
    cut = data.draw(st.integers(1, max([1, *race.needed[:when]])))
    late = fold(race.stream[cut - 1 :])
    for fleet in (*race.read.values(), late):
        assert (fleet.epoch, fleet.leader, fleet.wanted) == (
            race.whole.epoch,
            race.whole.leader,
            race.whole.wanted,
        )
        assert fleet.decided == race.whole.decided


@pytest.mark.parametrize(
    "events",
    [
        # Decided under the first, and under the second of one model only.
        [elected(1), decided(0, 1, epoch=1), decided(0, 2, epoch=1, model="n"), elected(2, "b")],
        # A late reader first meets a decision of an old epoch, which does not count.
        [elected(1), decided(0, 1, epoch=1), decided(5, 6), elected(2, "b"), decided(1, 2, epoch=2)],
        # Before anybody was elected.
        [decided(0, 1), decided(1, 2), elected(1), decided(2, 0, epoch=1), elected(2, "b")],
    ],
)
def test_who_begins_behind_any_trim_comes_to_the_same(events: list[Any]) -> None:
    stream = [stored(number, event) for number, event in enumerate(events, 1)]
    whole = fold(stream)
    needed = [fold(stream[:end]).needed_from for end in range(1, len(stream) + 1)]
    assert needed == sorted(needed)
    for cut in range(1, needed[-1] + 1):
        late = fold(stream[cut - 1 :])
        assert (late.epoch, late.leader, late.wanted) == (whole.epoch, whole.leader, whole.wanted), cut
        assert (late.decided, late.needed_from) == (whole.decided, whole.needed_from)
