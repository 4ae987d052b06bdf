"""Random schedules of the protocol alone: writers with stale knowledge, one total order, and readers.

No gateway, worker or broker of Rift takes part, but any of their faults is a case of these schedules. Writers
only append. Their knowledge may be stale, their records may be stored twice, late or never, and each may fall
silent or return. One schedule is one request from one seed. `protocol_oracle.py` checks it.

    python -m tests.simulation.protocol_model SEED     prints a schedule's log and its violation, if any
"""

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

from events.ids import new_request_id
from events.lifecycle import NEW, Life, advance
from events.schema import (
    AttemptReleased,
    AttemptStarted,
    CancelRequested,
    Parameters,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)
from events.subjects import Address
from tests.simulation.promise import Violation, hold
from tests.simulation.protocol_oracle import Oracle

Advance = Callable[[Life, Any], Life]
Record = tuple[Any, ...]

AT = Address(0, "lane5678", "model-a")
REQUEST = new_request_id(secret=b"s" * 32, account="a", at=AT, floor=0, entropy=b"0123456789")
ACCEPTED = RequestAccepted(
    request=REQUEST,
    account="a",
    key="k",
    model="model-a",
    kind="inference",
    input="p",
    parameters=Parameters(),
    stream=True,
    prompt_tokens_max=8,
    deadline_ms=1000,
    price_version=1,
)

# Long enough for three attempts to overlap, short enough for thousands of schedules in a few seconds.
STEPS = 60
ATTEMPTS_MAX = 5
TOKENS_MAX = 8

# The outcomes of an append, with their weights. A writer repeats an append without an answer. "answered only"
# is a broker that acknowledges a record without storing it, so later records follow a gap.
OUTCOMES = {"stored": 79, "unanswered": 6, "late": 6, "lost": 6, "answered only": 3}


class Attempt:
    """One attempt as its worker sees it. A `careful` one reads its own start before it generates."""

    def __init__(self, name: str, *, knows: int, life: Life, text: Sequence[int], careful: bool) -> None:
        self.name, self.knows, self.careful = name, knows, careful
        self.text = list(text[: life.next_index])
        self.queue: list[Any] = [
            AttemptStarted(
                request=REQUEST,
                attempt=name,
                after=life.attempt,
                resume_index=life.next_index,
                worker="w",
                prompt_tokens=1,
                accepted_at_ns=1,
                engine="sim",
                model_digest="d",
                delivery="",
            )
        ]
        self.sent: Record = ()
        self.read_to = knows
        self.is_started = False
        self.is_confirmed = not careful
        self.is_done = False

    def generate(self, tokens: Sequence[int], *, end: bool) -> None:
        self.queue.append(
            TokensGenerated(attempt=self.name, index=len(self.text), token_ids=tuple(tokens), text="")
        )
        self.text += tokens
        if end:
            self.finish("length")

    def finish(self, reason: Any) -> None:
        self.queue.append(
            RequestFinished(request=REQUEST, attempt=self.name, reason=reason, output_tokens=len(self.text))
        )
        self.is_done = True


class Client:
    """A reader that shows the counted tokens. It may pause, or resume at another gateway."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._life, self._position = NEW, 0
        self.shown: list[int] = []
        self._last_id = 0

    def read(self, log: Sequence[Any], to: int) -> None:
        for event in log[self._position : to]:
            before, self._life = self._life, self._advance(self._life, event)
            if self._life.counted > max(self._last_id, before.counted):
                self._last_id = self._life.counted
                if isinstance(event, TokensGenerated):
                    self.shown += event.token_ids
        self._position = max(self._position, to)

    def resume(self) -> None:
        """Continue at another reader, without its state, from the last id that was shown."""
        self._life, self._position = NEW, 0


class Schedule:
    def __init__(self, chance: random.Random, advance: Advance = advance) -> None:
        self.chance = chance
        self._advance = advance
        self.log: list[Any] = []
        self.lives: list[Life] = [NEW]
        self.attempts: dict[str, Attempt] = {}
        self.oracle = Oracle(self.attempts)
        self._afloat: list[Record] = []
        self._landed: list[Record] = []
        self._clients = [Client(advance) for _ in range(2)]
        self._tokens = 0

    @property
    def life(self) -> Life:
        return self.lives[-1]

    def run(self) -> None:
        """Raises Violation."""
        steps, weights = zip(*STEP_WEIGHTS.items(), strict=True)
        self.accept()
        for step in self.chance.choices(steps, weights, k=STEPS):
            step(self)
        self.settle()
        self.check_readers()

    def land(self, record: Record) -> None:
        self._landed.append(record)
        for event in record:
            before, after = self.life, self._advance(self.life, event)
            self.log.append(event)
            self.lives.append(after)
            self.oracle.judge(event, before, after, len(self.log) - 1)

    # --- steps -------------------------------------------------------------------------------------

    def accept(self) -> None:
        """A gateway appends the acceptance, again or late."""
        if self.chance.random() < 0.3:
            self._afloat.append((ACCEPTED,))
        else:
            self.land((ACCEPTED,))

    def take(self) -> None:
        """Deliver the job to a worker that has read the log to its end, or to an earlier position."""
        if not self.oracle.is_accepted or len(self.attempts) == ATTEMPTS_MAX:
            return
        first = self.log.index(ACCEPTED) + 1
        latest = len(self.log)
        knows = latest if self.chance.random() < 0.5 else self.chance.randint(first, latest)
        self._take(knows, careful=self.chance.random() < 0.6)

    def _take(self, knows: int, *, careful: bool) -> Attempt | None:
        life = self.lives[knows]
        if life.phase == "ended":
            return None
        name = f"att{len(self.attempts)}"
        attempt = Attempt(name, knows=knows, life=life, text=self.oracle.text, careful=careful)
        self.attempts[name] = attempt
        return attempt

    def write(self) -> None:
        """Append one record of some attempt; the writer repeats it until it is acknowledged."""
        waiting = [attempt for attempt in self.attempts.values() if attempt.sent or attempt.queue]
        if waiting:
            outcome = self.chance.choices(list(OUTCOMES), list(OUTCOMES.values()))[0]
            self._write(self.chance.choice(waiting), outcome)

    def _write(self, attempt: Attempt, outcome: str = "stored") -> None:
        if not attempt.sent:
            many = self.chance.randint(1, len(attempt.queue))
            attempt.sent, attempt.queue = tuple(attempt.queue[:many]), attempt.queue[many:]
        if outcome == "late":
            self._afloat.append(attempt.sent)
        elif outcome in ("stored", "unanswered"):
            self.land(attempt.sent)
        if outcome in ("stored", "answered only"):
            attempt.is_started = True
            attempt.sent = ()

    def generate(self) -> None:
        """Generate tokens in an attempt that takes itself for the current one."""
        able = [a for a in self.attempts.values() if a.is_started and a.is_confirmed and not a.is_done]
        if able:
            attempt = self.chance.choice(able)
            self._generate(attempt, end=self.chance.random() < 0.15)

    def _generate(self, attempt: Attempt, *, end: bool) -> None:
        count = self.chance.randint(1, 3)
        # Every token is unique, so that the texts of two attempts always differ.
        tokens = range(self._tokens, self._tokens + count)
        self._tokens += count
        attempt.generate(tokens, end=end or len(attempt.text) + count >= TOKENS_MAX)

    def read(self) -> None:
        """Let a worker read some more events and act on them."""
        if self.attempts:
            attempt = self.chance.choice(list(self.attempts.values()))
            self._read(attempt, self.chance.randint(attempt.read_to, len(self.log)))

    def _read(self, attempt: Attempt, to: int) -> None:
        for position in range(attempt.read_to, to):
            event, life = self.log[position], self.lives[position + 1]
            own = getattr(event, "attempt", None) == attempt.name
            if own and isinstance(event, AttemptStarted):
                attempt.is_confirmed = True
                attempt.is_done = attempt.is_done or life.attempt != attempt.name
            is_cancelled = own and isinstance(event, CancelRequested)
            superseded = attempt.is_confirmed and life.attempt != attempt.name
            if is_cancelled or superseded or life.phase == "ended":
                attempt.is_done = True
            elif life.wanted and life.attempt == attempt.name and not attempt.is_done:
                attempt.finish("cancelled")
        attempt.read_to = to

    def release(self) -> None:
        """Drain a worker, or declare it lost, rightly or not."""
        if not self.attempts:
            return
        attempt = self.chance.choice(list(self.attempts.values()))
        if self.chance.random() < 0.5 and not attempt.is_done:
            attempt.queue.append(AttemptReleased(attempt=attempt.name, why="draining"))
            attempt.is_done = True
        else:
            self.land((AttemptReleased(attempt=attempt.name, why="lost"),))

    def crash(self) -> None:
        """End a worker; its last record may still be stored."""
        if self.attempts:
            attempt = self.chance.choice(list(self.attempts.values()))
            if attempt.sent and self.chance.random() < 0.5:
                self._afloat.append(attempt.sent)
            attempt.sent, attempt.queue, attempt.is_done = (), [], True

    def cancel(self) -> None:
        self.land((CancelRequested(request=REQUEST, why=self.chance.choice(["client", "disconnect"])),))

    def tell(self) -> None:
        """Ask the worker of one attempt to stop, rightly or not."""
        if self.attempts:
            name = self.chance.choice(list(self.attempts))
            self.land((CancelRequested(request=REQUEST, why="superseded", attempt=name),))

    def expire(self) -> None:
        """Let control end the request with a wrong number of tokens, which must be ignored."""
        reason = self.chance.choice(["expired", "failed", "poison"])
        self.land((RequestFinished(request=REQUEST, attempt=None, reason=reason, output_tokens=99),))

    def land_late(self) -> None:
        if self._afloat:
            self.land(self._afloat.pop(self.chance.randrange(len(self._afloat))))

    def land_again(self) -> None:
        if self._landed:
            self.land(self.chance.choice(self._landed))

    def client(self) -> None:
        client = self.chance.choice(self._clients)
        if self.chance.random() < 0.3:
            client.resume()
        client.read(self.log, self.chance.randint(0, len(self.log)))

    # --- the end -----------------------------------------------------------------------------------

    def settle(self) -> None:
        """Apply the janitor's rule, then store all pending records: one end counts, and nothing after it."""
        if not self.oracle.is_accepted:
            self.land((ACCEPTED,))
        if self.life.phase != "ended" and self.life.wanted:
            self.land((RequestFinished(request=REQUEST, attempt=None, reason="cancelled", output_tokens=0),))
        elif self.life.phase != "ended":
            self.land((ACCEPTED,))
            self._finish_in_order()
        hold(self.life.phase == "ended", "a healthy worker alone could not end the request")
        while any(attempt.sent or attempt.queue for attempt in self.attempts.values()):
            self.write()
        for record in self.chance.sample([*self._landed, *self._afloat], len(self._landed + self._afloat)):
            self.land(record)
        hold(self.oracle.is_ended, "the fold ended the request, and no event did")

    def _finish_in_order(self) -> None:
        attempt = self._take(len(self.log), careful=True)
        assert attempt is not None, "an open request can be taken"
        self._write(attempt)
        self._read(attempt, len(self.log))
        while not attempt.is_done:
            self._generate(attempt, end=len(attempt.text) > TOKENS_MAX)
        while attempt.queue:
            self._write(attempt)

    def check_readers(self) -> None:
        """Check that all readers have seen the same, wherever they paused and resumed."""
        for client in self._clients:
            so_far = len(client.shown)
            hold(
                client.shown == self.oracle.text[:so_far],
                "a client was shown a token that is not there",
            )
            client.read(self.log, len(self.log))
            hold(client.shown == self.oracle.text, "a client was not shown the whole text")
        again = NEW
        for event in self.log:
            again = self._advance(again, event)
        hold(again == self.life, "a second reader has a different life")


STEP_WEIGHTS: dict[Callable[[Schedule], None], float] = {
    Schedule.accept: 4,
    Schedule.take: 7,
    Schedule.write: 22,
    Schedule.generate: 16,
    Schedule.read: 14,
    Schedule.release: 2,
    Schedule.crash: 2,
    Schedule.cancel: 0.5,
    Schedule.tell: 2,
    Schedule.expire: 0.5,
    Schedule.land_late: 3,
    Schedule.land_again: 3,
    Schedule.client: 3,
}


def run(seed: int, advance: Advance = advance) -> Schedule:
    """Run one schedule and return it. Raises Violation with the command that repeats it."""
    schedule = Schedule(random.Random(seed), advance)
    try:
        schedule.run()
    except Violation as violation:
        command = f"python -m tests.simulation.protocol_model {seed}"
        raise Violation(f"{violation}\nrepeat it with: {command}") from violation
    return schedule


def main(seed: int) -> None:
    schedule = Schedule(random.Random(seed))
    try:
        schedule.run()
    finally:
        for position, (event, life) in enumerate(zip(schedule.log, schedule.lives[1:], strict=False)):
            mark = "*" if life.counted > schedule.lives[position].counted else " "
            print(f"{position:4} {mark} {event}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
