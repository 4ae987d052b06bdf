"""The lane's writer, on a log that stores records on command."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import anyio
import msgspec
import pytest

from events import codec
from events.log import Log, LogError, OutcomeUnknown, Settled
from events.schema import (
    AttemptReleased,
    AttemptStarted,
    Logprob,
    RequestFinished,
    TokensGenerated,
    ToolCallDelta,
)
from events.subjects import Address
from rift.worker import lane_writer
from rift.worker.lane_writer import LaneWriter

pytestmark = pytest.mark.anyio


class SlowLog:
    """Stores a record whenever `store` is called; before that, appends wait.

    `begins`: an append can begin at once. Otherwise it waits in a task.
    """

    def __init__(self, *, begins: bool = True) -> None:
        self.records: list[list[Any]] = []
        self.begun: list[float] = []
        self.at_once = False
        self.begins = begins
        self.waiting: list[Callable[[int | LogError], None]] = []
        self._data: list[bytes] = []

    def begin_append(self, stream: str, subject: str, data: bytes, settled: Settled) -> bool:
        if not self.begins:
            return False
        self.begun.append(anyio.current_time())
        self._data.append(data)
        if self.at_once:
            settled(self._store())
        else:
            self.waiting.append(settled)
        return True

    async def append(self, stream: str, subject: str, data: bytes, **more: Any) -> int:
        outcomes: list[int | LogError] = []
        is_settled = anyio.Event()

        def settled(outcome: int | LogError) -> None:
            outcomes.append(outcome)
            is_settled.set()

        self.begun.append(anyio.current_time())
        self._data.append(data)
        self.waiting.append(settled)
        await is_settled.wait()
        if isinstance(outcomes[0], LogError):
            raise outcomes[0]
        return outcomes[0]

    def _store(self) -> int:
        self.records.append(list(codec.decode(self._data.pop(0))[1]))
        return len(self.records)

    async def store(self) -> None:
        await anyio.wait_all_tasks_blocked()
        self.waiting.pop(0)(self._store())
        await anyio.wait_all_tasks_blocked()

    async def fail(self, error: LogError) -> None:
        await anyio.wait_all_tasks_blocked()
        self._data.pop(0)
        self.waiting.pop(0)(error)
        await anyio.wait_all_tasks_blocked()


def tokens(attempt: str, index: int, *ids: int) -> TokensGenerated:
    return TokensGenerated(attempt=attempt, index=index, token_ids=ids, text="".join(f"<{i}>" for i in ids))


def finished(attempt: str, count: int) -> RequestFinished:
    return RequestFinished(request="r", attempt=attempt, reason="stop", output_tokens=count)


def started(attempt: str) -> AttemptStarted:
    return AttemptStarted(
        request="r",
        attempt=attempt,
        after=None,
        resume_index=0,
        worker="w",
        prompt_tokens=1,
        accepted_at_ns=1,
        engine="sim",
        model_digest="d",
        delivery="x",
    )


@asynccontextmanager
async def writing(log: SlowLog) -> AsyncIterator[LaneWriter]:
    writer = LaneWriter(cast(Log, log), Address(0, "lane", "model"), name="w", blocked=lambda: None)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(writer.run)
        yield writer
        tasks.cancel_scope.cancel()


async def test_the_next_record_has_one_event_per_attempt() -> None:
    log = SlowLog()
    async with writing(log) as writer:
        writer.put(tokens("a", 0, 1))
        await anyio.wait_all_tasks_blocked()
        for event in (tokens("a", 1, 2), tokens("b", 0, 9), tokens("a", 2, 3, 4), tokens("b", 1, 8)):
            writer.put(event)
        await log.store()
        await log.store()
    assert log.records == [[tokens("a", 0, 1)], [tokens("a", 1, 2, 3, 4), tokens("b", 0, 9, 8)]]


async def test_the_end_stays_with_the_last_tokens_and_a_release_after_them() -> None:
    log = SlowLog()
    async with writing(log) as writer:
        writer.put(tokens("x", 0, 1))
        await anyio.wait_all_tasks_blocked()
        writer.put(tokens("a", 1, 2))
        writer.put(tokens("b", 1, 5))
        writer.put(tokens("a", 2, 3), finished("a", 3))
        writer.put(AttemptReleased(attempt="b", why="draining"))
        await log.store()
        await log.store()
        await writer.flushed()
    assert log.records[1] == [
        tokens("a", 1, 2, 3),
        finished("a", 3),
        tokens("b", 1, 5),
        AttemptReleased(attempt="b", why="draining"),
    ]


async def test_joined_tokens_keep_every_field() -> None:
    log = SlowLog()
    calls = (ToolCallDelta(index=0, arguments="{"), ToolCallDelta(index=0, arguments="}"))
    logprobs = (Logprob(token="x", logprob=-1.0), Logprob(token="y", logprob=-2.0))
    async with writing(log) as writer:
        writer.put(tokens("b", 0, 9))
        await anyio.wait_all_tasks_blocked()
        for index in (0, 1):
            writer.put(
                msgspec.structs.replace(
                    tokens("a", index, index),
                    reasoning="rs"[index],
                    tool_calls=calls[index : index + 1],
                    logprobs=logprobs[index : index + 1],
                    cached_tokens=index,
                )
            )
        await log.store()
        await anyio.sleep(2 * lane_writer.PACE_S)
        await log.store()
    (joined,) = log.records[1]
    assert (joined.reasoning, joined.tool_calls, joined.logprobs) == ("rs", calls, logprobs)
    assert (joined.token_ids, joined.index, joined.cached_tokens) == ((0, 1), 0, 1)


async def test_a_record_in_flight_does_not_grow() -> None:
    log = SlowLog()
    async with writing(log) as writer:
        writer.put(tokens("a", 0, 1))
        await anyio.wait_all_tasks_blocked()
        writer.put(tokens("a", 1, 2))
        await log.store()
        writer.put(tokens("a", 2, 3))
        await anyio.sleep(2 * lane_writer.PACE_S)
        await log.store()
        await anyio.sleep(2 * lane_writer.PACE_S)
        if log.waiting:
            await log.store()
    ids = [token_id for record in log.records for event in record for token_id in event.token_ids]
    assert ids == [1, 2, 3]


async def test_a_start_is_durable_with_its_own_record() -> None:
    log = SlowLog()
    sequences: list[int] = []

    async with writing(log) as writer, anyio.create_task_group() as tasks:

        async def start() -> None:
            sequences.append(await writer.put_tracked(started("b")).stored())

        writer.put(tokens("a", 0, 1))
        await anyio.wait_all_tasks_blocked()
        writer.put(tokens("a", 1, 2))
        tasks.start_soon(start)
        await anyio.wait_all_tasks_blocked()
        writer.put(tokens("a", 2, 3))
        await log.store()
        assert sequences == []
        await log.store()
        assert sequences == [2]


async def test_a_large_record_is_split_between_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_writer, "TOKEN_RECORD_BYTES_MAX", 300)
    log = SlowLog()
    async with writing(log) as writer:
        writer.put(tokens("x", 0, 1))
        await anyio.wait_all_tasks_blocked()
        for name in "abcdef":
            writer.put(tokens(name, 0, 1))
        log.at_once = True
        await log.store()
        with anyio.fail_after(1):
            await writer.flushed()
    assert [event.attempt for record in log.records for event in record] == list("xabcdef")
    assert len(log.records) > 2


async def test_only_further_tokens_wait_for_the_pace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lane_writer, "PACE_S", 0.2)
    log = SlowLog()
    log.at_once = True
    async with writing(log) as writer:
        writer.put(tokens("a", 0, 1))
        await anyio.wait_all_tasks_blocked()
        writer.put(tokens("a", 1, 2))
        await anyio.sleep(0.05)
        assert len(log.records) == 1, "further tokens wait for the pace"
        writer.put(tokens("b", 0, 1))
        await anyio.sleep(0.05)
        assert log.records[1] == [tokens("a", 1, 2), tokens("b", 0, 1)], (
            "an answer's first tokens take the others with them"
        )
        writer.put(tokens("a", 2, 3))
        await anyio.sleep(0.4)
        writer.put(tokens("a", 3, 4))
        await anyio.sleep(0.05)
    assert log.records[2:] == [[tokens("a", 2, 3)], [tokens("a", 3, 4)]], "after a pause, at once"
    assert log.begun[2] - log.begun[1] >= 0.19


async def test_added_events_wait_for_the_end_of_the_step() -> None:
    log = SlowLog()
    log.at_once = True
    async with writing(log) as writer:
        writer.add(tokens("a", 0, 1))
        writer.add(tokens("b", 0, 9))
        assert log.records == []
        writer.flush()
        assert log.records == [[tokens("a", 0, 1), tokens("b", 0, 9)]], "no task in between"


@pytest.mark.parametrize("begins", [True, False])
async def test_a_record_that_failed_is_appended_again_before_the_next(
    begins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = SlowLog(begins=begins)
    async with writing(log) as writer:
        writer.put(tokens("a", 0, 1))
        await log.fail(OutcomeUnknown("no answer"))
        writer.put(tokens("a", 1, 2))
        await anyio.sleep(0.15)
        await log.store()
        await anyio.sleep(2 * lane_writer.PACE_S)
        await log.store()
        await writer.flushed()
    assert log.records == [[tokens("a", 0, 1)], [tokens("a", 1, 2)]]
