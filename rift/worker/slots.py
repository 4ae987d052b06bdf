"""The requests that a replica may run at once: one pool, whichever shards they come from.

While slots are free, each shard is asked for an equal part of them, at least one. So one busy shard fills the
whole engine in a few round trips, and busy shards get equally many. The jobs of one slot that several shards
send wait in the engine: a replica holds at most one less than the number of shards beyond its slots, and for
a moment as many as its shards were asked for within one pull.

While `unfilled_max` tokens of prompts wait in the engine, no shard is asked: see `unfilled_max` in
`events/fleet.py`.
"""

import msgspec

from events.fleet import may_ask
from events.log import Jobs
from rift.engines import LONG_BYTES
from rift.worker.attempt import Attempt
from rift.worker.counts import WorkerCounts
from rift.worker.isolation import Isolation
from rift.worker.shutdown import Shutdown

# No engine fills that many, so the prompts that wait do not matter.
UNBOUNDED = 1 << 62

# A prompt's tokens are known once it is encoded. Until then, assume this many bytes of its record for each.
BYTES_PER_TOKEN = 4

# The usual prompt follows each new one by this part of the difference.
USUAL = 8


class Place(msgspec.Struct, eq=False):
    """A taken slot. `tokens` of its prompt keep the engine busy until `attempt` has a token."""

    tokens: int
    attempt: Attempt | None = None

    @property
    def is_filled(self) -> bool:
        return self.attempt is not None and self.attempt.new_tokens > 0


class Slots:
    """`isolation` says which of the replica's requests run together, `shutdown` how long it still serves, and
    `counts` what was done. No job is asked for while `unfilled_max` tokens of prompts wait in the engine."""

    def __init__(self, total: int, shutdown: Shutdown, *, unfilled_max: int = UNBOUNDED) -> None:
        self.total = total
        self.counts = WorkerCounts()
        self.isolation = Isolation()
        self._free = total
        self.shutdown = shutdown
        self._queues: list[Jobs] = []
        self._unfilled_max = unfilled_max
        # Until the first prompt, ask for one: a queue that has waited for this replica may be of long ones.
        self._usual_tokens = unfilled_max
        self._unfilled: set[Place] = set()

    @property
    def used(self) -> int:
        """May exceed `total` for a moment."""
        return self.total - self._free

    def add(self, jobs: Jobs) -> None:
        """Fill the slots from another shard too."""
        self._queues.append(jobs)
        self.ask()

    def take(self, record_bytes: int) -> Place:
        """Take a slot for a job whose record has that size."""
        tokens = record_bytes // BYTES_PER_TOKEN
        if self._usual_tokens == self._unfilled_max:
            self._usual_tokens = tokens
        self._usual_tokens += (tokens - self._usual_tokens) // USUAL
        # A long prompt waits for its turn to be encoded, and keeps the engine from nothing meanwhile.
        place = Place(tokens if record_bytes <= LONG_BYTES else 0)
        self._unfilled.add(place)
        self._free -= 1
        self.ask()
        return place

    def begin(self, place: Place, attempt: Attempt) -> None:
        """Note which attempt a slot was taken for."""
        place.attempt = attempt
        # Nor does a prompt that waits for its grammar.
        place.tokens = attempt.prompt_tokens if attempt.fills_at_once else 0
        self.ask()

    def give_back(self, place: Place) -> None:
        self._unfilled.discard(place)
        self._free += 1
        self.ask()

    def step(self) -> None:
        """Count a step of the engine, and ask for jobs if it has filled a prompt."""
        self.counts.step()
        if filled := [place for place in self._unfilled if place.is_filled]:
            self._unfilled.difference_update(filled)
            self.ask()

    def ask(self) -> None:
        """Ask for jobs: none while a suspect or enough prompts wait, or at shutdown."""
        is_paused = self.isolation.is_requested or self.shutdown.is_requested
        unfilled = sum(place.tokens for place in self._unfilled)
        free = min(self._free, may_ask(unfilled, self._unfilled_max, self._usual_tokens))
        free = 0 if is_paused else max(0, free)
        for jobs in self._queues:
            jobs.want(-(-free // len(self._queues)))
