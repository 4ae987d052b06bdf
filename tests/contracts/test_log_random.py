"""The log in memory against a real nats-server: the same random operations, the same answers.

Sequences are compared relative to where an example begins; addresses are new for each. A difference that
both may have, and that no reader may rely on, is not compared: the order in which jobs are delivered again.
"""

from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import anyio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from events import memory, subjects
from events.jetstream import connect
from events.log import Conflict, Job, Log
from events.subjects import Address

STREAM = "RIFT_0"
LANES = 2
EXAMPLES = 25
MIB = 1024 * 1024

examples = count()

Operation = tuple[Any, ...]

kinds = st.sampled_from(["request", "work", "cancel"])
lanes = st.integers(0, LANES - 1)
back = st.integers(0, 12)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), kinds, lanes, st.binary(max_size=8)),
        st.tuples(st.just("append if last"), kinds, lanes, back),
        st.tuples(st.just("last"), kinds, lanes),
        st.tuples(st.just("scan"), kinds, lanes, back),
        st.tuples(st.just("follow"), kinds, lanes, back),
        st.tuples(st.just("trim"), back),
        st.tuples(st.just("take all")),
        st.tuples(st.just("ack"), back),
        st.tuples(st.just("give back"), back),
        st.tuples(st.just("in progress"), back),
    ),
    min_size=5,
    max_size=40,
)


class Run:
    """Runs the operations on one log, and keeps its answers in `answers`."""

    def __init__(self, log: Log, example: int) -> None:
        self.answers: list[Any] = []
        self._log = log
        self._model = f"model-random-{example}"
        self._lanes = [Address(0, f"random{example:04}n{lane}", self._model) for lane in range(LANES)]
        self._base = 0
        self._appended = 0
        self._queued: set[int] = set()
        self._held: dict[int, Job] = {}

    async def run(self, wanted: list[Operation]) -> None:
        self._base = await self._log.last_sequence(STREAM)
        async with self._log.jobs(0, self._model) as self._jobs:
            for name, *arguments in wanted:
                self.answers.append((name, await self._operations[name](self, *arguments)))

    def _subject(self, kind: str, lane: int) -> str:
        of: dict[str, Callable[[Address], str]] = {
            "request": subjects.request,
            "work": subjects.work,
            "cancel": subjects.cancel,
        }
        return of[kind](self._lanes[lane])

    def _relative(self, sequence: int) -> int:
        return sequence - self._base if sequence else 0

    async def _append(self, kind: str, lane: int, data: bytes, expect_last: int | None = None) -> Any:
        subject = self._subject(kind, lane)
        try:
            sequence = await self._log.append(STREAM, subject, data, expect_last=expect_last)
        except Conflict:
            return "conflict"
        self._appended += 1
        if kind == "request":
            self._queued.add(sequence)
        return self._relative(sequence)

    async def _append_if_last(self, kind: str, lane: int, before: int) -> Any:
        """Expect the last sequence, or an earlier one."""
        last = await self._log.last_sequence(STREAM, self._subject(kind, lane))
        return await self._append(kind, lane, b"if", expect_last=max(0, last - before // 4))

    async def _last(self, kind: str, lane: int) -> Any:
        subject = self._subject(kind, lane)
        last = await self._log.last(STREAM, subject)
        return (
            self._relative(await self._log.last_sequence(STREAM, subject)),
            self._relative(await self._log.last_sequence(STREAM)),
            last and (last.subject.split(".")[2], self._relative(last.sequence), last.data),
        )

    async def _scan(self, kind: str, lane: int, before: int) -> Any:
        """Up to the last message of the subject, or to one before it, which is another's or its own."""
        subject = self._subject(kind, lane)
        target = await self._log.last_sequence(STREAM, subject)
        first = max(1, target - before)
        topics = list(dict.fromkeys([subject, self._subject("work", lane)]))
        batches = self._log.scan(STREAM, topics, first=first, target=target)
        return [(self._relative(s.sequence), s.data) async for batch in batches for s in batch]

    async def _follow(self, kind: str, lane: int, before: int) -> Any:
        subject = self._subject(kind, lane)
        target = await self._log.last_sequence(STREAM, subject)
        after = max(0, target - before)
        found: list[Any] = []
        if not target or not before:
            return found
        async with self._log.follow(STREAM, [subject], after=after) as follower:
            with anyio.fail_after(10):
                while follower.position < target:
                    found += [(self._relative(s.sequence), s.data) for s in await anext(aiter(follower))]
        return found

    async def _trim(self, before: int) -> Any:
        """Trim up to some message before the last; a trimmed job can no longer be answered."""
        up_to = max(self._base, await self._log.last_sequence(STREAM) - before)
        await self._log.trim(STREAM, up_to)
        self._queued = {sequence for sequence in self._queued if sequence > up_to}
        self._held = {sequence: job for sequence, job in self._held.items() if sequence > up_to}
        return self._relative(await self._log.first_sequence(STREAM))

    async def _take_all(self) -> Any:
        due = len(self._queued) - len(self._held)
        self._jobs.want(due)
        taken = []
        with anyio.fail_after(10):
            for _ in range(due):
                job = await anext(aiter(self._jobs))
                self._held[job.stored.sequence] = job
                taken.append((self._relative(job.stored.sequence), job.deliveries))
        return sorted(taken)

    async def _ack(self, which: int) -> Any:
        if (job := self._pick(which)) is not None:
            await self._log.ack(job.ack)
            del self._held[job.stored.sequence]
            self._queued.remove(job.stored.sequence)

    async def _give_back(self, which: int) -> Any:
        if (job := self._pick(which)) is not None:
            await self._log.give_back(job.ack)
            del self._held[job.stored.sequence]

    async def _in_progress(self, which: int) -> Any:
        if (job := self._pick(which)) is not None:
            await self._log.in_progress(job.ack)

    def _pick(self, which: int) -> Job | None:
        held = sorted(self._held)
        return self._held[held[which % len(held)]] if held else None

    _operations: dict[str, Callable[..., Awaitable[Any]]] = {  # noqa: RUF012
        "append": _append,
        "append if last": _append_if_last,
        "last": _last,
        "scan": _scan,
        "follow": _follow,
        "trim": _trim,
        "take all": _take_all,
        "ack": _ack,
        "give back": _give_back,
        "in progress": _in_progress,
    }


async def in_memory(wanted: list[Operation]) -> list[Any]:
    ticks = count(1_750_000_000_000_000_000)
    async with anyio.create_task_group() as tasks:
        run = Run(memory.connect(memory.MemoryBroker(tasks, lambda: next(ticks))), 0)
        await run.run(wanted)
        return run.answers


async def on_nats(server: Any, wanted: list[Operation]) -> list[Any]:
    log = await connect(server.address.url, server.address.access("admin"), name="random")
    try:
        await log.ensure_streams(shards=1, replicas=1, max_bytes=64 * MIB)
        run = Run(log, next(examples))
        await run.run(wanted)
        return run.answers
    finally:
        await log.close()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=operations)
def test_both_answer_the_same(server: Any, wanted: list[Operation]) -> None:
    expected = anyio.run(on_nats, server, wanted)
    assert anyio.run(in_memory, wanted) == expected
