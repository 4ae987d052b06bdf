"""A fold of the simulated log that checks the invariants of every request after every record.

The ledger reads the broker's memory directly, without delays and faults. It uses Rift's own life cycle, which
`protocol_model.py` tests separately, and checks the counted events as a client, an auditor and an operator
would.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec

from events import codec, subjects
from events.lifecycle import Life
from events.log import Stored
from events.memory import MemoryBroker
from events.pricing import charge_nanousd
from events.request_states import RequestStates
from events.schema import AttemptStarted, Price, RequestAccepted, RequestFinished, TokensGenerated
from replay.facts.fold import Batch, FactFold
from replay.facts.fold import read as read_batch
from replay.facts.rows import RequestRow
from tests.simulation.promise import hold

# Of an installation with one shard.
STREAM = subjects.shard_stream(0)


def shard_streams(broker: MemoryBroker) -> list[str]:
    return [subjects.shard_stream(shard) for shard in range(broker.shards)]


class Entry(msgspec.Struct):
    """One request: each event that counted, in order; number n of a stream is `events[n - 1]`.

    `over_at_ns` is when it ended, or when its end was first requested.
    """

    accepted: RequestAccepted
    accepted_at_ns: int
    events: list[Any] = []
    token_ids: list[int] = []
    text: str = ""
    attempts: list[str] = []
    life: Life = Life()
    ended_at_ns: int = 0
    over_at_ns: int = 0

    @property
    def id(self) -> str:
        return self.accepted.request

    @property
    def prompt(self) -> str:
        prompt = self.accepted.input
        return prompt if isinstance(prompt, str) else prompt[0].content


class Ledger:
    def __init__(self, broker: MemoryBroker, price: Price) -> None:
        self.entries: dict[str, Entry] = {}
        self.price = price
        self._broker = broker
        self._lives = RequestStates()
        self._read_to: Counter[str] = Counter()

    async def watch(self, shard: int) -> None:
        """Check every record of a shard as it is stored, until cancelled. Raises Violation."""
        stream = self._broker.stream(subjects.shard_stream(shard))
        while True:
            changed = stream.changed.pending
            self.catch_up()
            await changed.wait()

    def catch_up(self) -> None:
        for name in shard_streams(self._broker):
            for stored in self._broker.stream(name).messages[self._read_to[name] :]:
                self._read_to[name] += 1
                place = self._read_to[name]
                hold(stored.sequence == place, f"sequence {stored.sequence} of {name} stands at {place}")
                self._check(stored)

    def _check(self, stored: Stored) -> None:
        at = subjects.parse(stored.subject)
        for event in codec.decode(stored.data)[1]:
            if at is None:
                continue
            if isinstance(event, RequestAccepted) and event.request not in self.entries:
                self.entries[event.request] = Entry(event, stored.stored_at_ns)
                self._lives.follow(event.request)
            if (counted := self._lives.fold(event, at)) is not None:
                entry = self.entries[counted[0]]
                self._count(entry, event, counted[1])
                if counted[1].phase == "ended":
                    entry.ended_at_ns = stored.stored_at_ns
                if counted[1].phase == "ended" or counted[1].wanted is not None:
                    entry.over_at_ns = entry.over_at_ns or stored.stored_at_ns

    def _count(self, entry: Entry, event: Any, life: Life) -> None:
        hold(not entry.ended_at_ns, f"{entry.id}: {event} counted after the end")
        entry.events.append(event)
        entry.life = life
        hold(life.counted == len(entry.events), f"{entry.id}: {event} has the wrong number")
        match event:
            case AttemptStarted():
                hold(event.attempt not in entry.attempts, f"{event.attempt} counted twice")
                entry.attempts.append(event.attempt)
            case TokensGenerated():
                hold(event.attempt == entry.attempts[-1], f"{entry.id}: tokens of an older attempt counted")
                hold(event.index == len(entry.token_ids), f"{entry.id}: {event.index} leaves a gap")
                entry.token_ids += event.token_ids
                entry.text += event.text
            case RequestFinished() if event.attempt is not None:
                hold(event.attempt == entry.attempts[-1], f"{entry.id}: ended by an older attempt")
        hold(life.next_index == len(entry.token_ids), f"{entry.id}: usage is not the counted tokens")

    # --- at the end ----------------------------------------------------------------------------------

    @property
    def open(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if not entry.ended_at_ns]

    def charge_nanousd(self, entry: Entry) -> int:
        return charge_nanousd(entry.life, self.price)

    def check_deadlines(self, now_ns: int, *, late_ns: int) -> None:
        for entry in self.open:
            due_ns = entry.accepted_at_ns + entry.accepted.deadline_ms * 1_000_000 + late_ns
            hold(now_ns < due_ns, f"{entry.id} is open long after its deadline")

    def check_projection(self, cut: int) -> None:
        """Check that the projector's fold, in batches of `cut` and of each shard in turn, bills as this
        ledger, each request once."""
        fold, rows, ended = FactFold(), list[Any](), set[str]()
        for batch in self._batches(cut):
            changes = fold.apply(batch, ended=frozenset(ended))
            hold(changes.stop is None, f"the projector stopped: {changes.stop}")
            rows += changes.rows
            ended |= {row.request_id for row in changes.rows if isinstance(row, RequestRow)}
        requests = [row for row in rows if isinstance(row, RequestRow)]
        billed = {row.request_id: (row.output_tokens, row.charge_nanousd) for row in requests}
        hold(len(billed) == len(requests), "the projector entered a request twice")
        expected = {
            entry.id: (len(entry.token_ids), self.charge_nanousd(entry))
            for entry in self.entries.values()
            if entry.ended_at_ns
        }
        hold(billed == expected, "the projector's bill differs from the ledger's")

    def _batches(self, cut: int) -> Iterator[Batch]:
        for names in ([subjects.BOOK], [subjects.FLEET], shard_streams(self._broker)):
            streams = {name: self._broker.stream(name).messages for name in names}
            for first in range(0, max(map(len, streams.values())), cut):
                for name, messages in streams.items():
                    yield read_batch(name, messages[first : first + cut])

    def digest(self) -> str:
        """Return the SHA-256 of everything the log holds: positions, times, subjects and bytes."""
        digest = hashlib.sha256()
        for name, stream in sorted(self._broker.streams.items()):
            for stored in stream.messages:
                head = f"{name} {stored.sequence} {stored.stored_at_ns} {stored.subject} {len(stored.data)}\n"
                digest.update(head.encode() + stored.data)
        return digest.hexdigest()
