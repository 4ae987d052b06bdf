"""The protocol's model driven by Hypothesis, which shrinks a failing schedule to a few steps.

The actors are those of `protocol_model.py`; Hypothesis draws the next actor and the outcome of its step. A
projector folds the same log in batches, with restarts, and must bill the text that the oracle counted.
"""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from events import codec, subjects
from events.lifecycle import NEW, Life, advance
from events.log import Stored
from events.schema import PricePublished, TokensGenerated
from replay.facts.fold import FactFold, read
from replay.facts.rows import RequestRow
from tests.simulation.promise import Violation, hold
from tests.simulation.protocol_model import ACCEPTED, AT, ATTEMPTS_MAX, OUTCOMES, Client, Schedule
from tests.simulation.protocol_oracle import PRICE

STREAM = subjects.shard_stream(AT.shard)
SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)


class Projector:
    """The fold of `replay` over the model's log, with one event a message."""

    def __init__(self) -> None:
        self.rows: list[RequestRow] = []
        self._fold = FactFold()
        book = codec.encode("cli", [PricePublished(id="price", version=1, prices=(PRICE,))])
        self._fold.apply(read(subjects.BOOK, [Stored(subjects.book("price", "list"), 1, 1, book)]))

    def apply(self, log: list[Any], to: int) -> None:
        first = self._fold.position(STREAM).sequence
        messages = [
            Stored(subjects.work(AT), first + n, first + n, codec.encode("w", [event]))
            for n, event in enumerate(log[first:to], start=1)
        ]
        ended = {row.request_id for row in self.rows}
        changes = self._fold.apply(read(STREAM, messages), ended=ended)
        hold(changes.stop is None, f"the projector stopped: {changes.stop}")
        self.rows += [row for row in changes.rows if isinstance(row, RequestRow)]


class Protocol(RuleBasedStateMachine):
    advance = staticmethod(advance)

    @initialize(chance=st.randoms(use_true_random=False))
    def begin(self, chance: Any) -> None:
        self.schedule = Schedule(chance, self.advance)
        self.schedule.land((ACCEPTED,))
        self.reader = Client(self.advance)
        self.projector = Projector()

    @rule()
    def submit(self) -> None:
        self.schedule.land((ACCEPTED,))

    @precondition(lambda self: len(self.schedule.attempts) < ATTEMPTS_MAX)
    @rule(behind=st.integers(0, 6), careful=st.booleans())
    def take(self, behind: int, careful: bool) -> None:
        self.schedule._take(max(1, len(self.schedule.log) - behind), careful=careful)

    @precondition(lambda self: self.able())
    @rule(data=st.data(), end=st.booleans())
    def emit(self, data: st.DataObject, end: bool) -> None:
        self.schedule._generate(data.draw(st.sampled_from(self.able())), end=end)

    @precondition(lambda self: self.writing())
    @rule(data=st.data(), outcome=st.sampled_from(list(OUTCOMES)))
    def write(self, data: st.DataObject, outcome: str) -> None:
        self.schedule._write(data.draw(st.sampled_from(self.writing())), outcome)

    @rule()
    def read_on(self) -> None:
        self.schedule.read()

    @rule(step=st.sampled_from([Schedule.release, Schedule.crash, Schedule.tell, Schedule.expire]))
    def fail(self, step: Any) -> None:
        step(self.schedule)

    @rule()
    def cancel(self) -> None:
        self.schedule.cancel()

    @rule(step=st.sampled_from([Schedule.land_late, Schedule.land_again]))
    def zombie(self, step: Any) -> None:
        step(self.schedule)

    @rule(resumes=st.booleans())
    def show(self, resumes: bool) -> None:
        if resumes:
            self.reader.resume()
        self.reader.read(self.schedule.log, len(self.schedule.log))
        hold(self.reader.shown == self.schedule.oracle.text, "the client was shown a different text")

    @rule(data=st.data(), restarts=st.booleans())
    def replay(self, data: st.DataObject, restarts: bool) -> None:
        if restarts:
            self.projector = Projector()
        self.projector.apply(self.schedule.log, data.draw(st.integers(0, len(self.schedule.log))))

    @invariant()
    def every_reader_agrees(self) -> None:
        again = NEW
        for event in self.schedule.log:
            again = self.advance(again, event)
        hold(again == self.schedule.life, "a second reader has a different life")

    def teardown(self) -> None:
        self.schedule.settle()
        self.schedule.check_readers()
        self.projector.apply(self.schedule.log, len(self.schedule.log))
        (row,) = self.projector.rows
        hold(row.output_tokens == len(self.schedule.oracle.text), "the projector bills a different text")
        hold(row.finish_reason == self.schedule.life.reason, "the projector has a different end")

    def writing(self) -> list[Any]:
        return [attempt for attempt in self.schedule.attempts.values() if attempt.sent or attempt.queue]

    def able(self) -> list[Any]:
        attempts = self.schedule.attempts.values()
        return [a for a in attempts if a.is_started and a.is_confirmed and not a.is_done]


TestProtocol = Protocol.TestCase
TestProtocol.settings = SETTINGS


def test_the_machine_finds_a_mistake() -> None:
    def drops_a_chunk(life: Life, event: Any) -> Life:
        dropped = isinstance(event, TokensGenerated) and event.index >= 3
        return life if dropped else advance(life, event)

    class Mutant(Protocol):
        advance = staticmethod(drops_a_chunk)

    case = Mutant.TestCase()
    case.settings = settings(SETTINGS, max_examples=300, database=None)
    with pytest.raises(Violation):
        case.runTest()
