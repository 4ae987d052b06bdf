"""An answer that no client could read is charged, and corrected once, by exactly its charge."""

import random
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest

from events import codec, ids, subjects
from events.memory import MemoryBroker, MemoryLog
from events.schema import (
    AccountOpened,
    AnyEvent,
    AttemptStarted,
    CancelReason,
    CancelRequested,
    Parameters,
    Price,
    PricePublished,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
    UsageCorrected,
)
from events.subjects import Address
from replay.warehouse.warehouse import Warehouse
from rift.control.duties import usage_correction
from rift.control.duties.usage_correction import UsageCorrection
from tests.simulation import clock
from tests.simulation.corrections import inline

START_NS = 1_700_000_000_000_000_000
SHARD = "RIFT_0"
AT = Address(0, "ownlane8", "m")
SECOND = 7


class World:
    def __init__(self, tasks: anyio.abc.TaskGroup, warehouse: Warehouse) -> None:
        self.broker = MemoryBroker(tasks, lambda: START_NS + int(anyio.current_time() * 1e9))
        self.warehouse = warehouse
        self.dice = random.Random(7)
        price = Price(model="m", prompt_nanousd=10, output_nanousd=1, second_nanousd=SECOND)
        self.say(AccountOpened(id="a", account="dev"), PricePublished(id="p", version=1, prices=(price,)))

    def say(self, *events: AnyEvent) -> None:
        data = codec.encode("test", list(events))
        self.broker.store(subjects.BOOK, "rift.book.any.dev", data, None)

    def store(self, subject: str, *events: AnyEvent) -> None:
        self.broker.store(SHARD, subject, codec.encode("test", list(events)), None)

    def cancel(self, request: str, why: CancelReason = "unanswered") -> None:
        self.store(subjects.cancel(AT), CancelRequested(request=request, why=why))

    def begin(
        self, *, plan: Literal["per_token", "per_second"] = "per_token", version: int = 1, **more: Any
    ) -> str:
        entropy = self.dice.randbytes(ids.RANDOM_BYTES)
        request = ids.new_request_id(secret=b"secret", account="dev", at=AT, floor=0, entropy=entropy)
        accepted = RequestAccepted(
            request=request, account="dev", key="k", model="m", kind="inference", input="x",
            parameters=Parameters(), stream=False,
            prompt_tokens_max=9, deadline_ms=1000, price_version=version, plan=plan, book=1, **more,
        )  # fmt: skip
        started = AttemptStarted(
            request=request, attempt=f"of-{request}", after=None, resume_index=0, worker="w", prompt_tokens=3,
            accepted_at_ns=0, engine="sim", model_digest="d", delivery="ack",
        )  # fmt: skip
        self.store(subjects.request(AT), accepted)
        self.store(subjects.work(AT), started)
        return request

    def end(self, request: str, tokens: int = 2) -> None:
        attempt = f"of-{request}"
        events: list[AnyEvent] = []
        if tokens:
            events.append(TokensGenerated(attempt=attempt, index=0, token_ids=(1,) * tokens, text="x"))
        end = RequestFinished(request=request, attempt=attempt, reason="stop", output_tokens=tokens)
        self.store(subjects.work(AT), *events, end)

    def project(self) -> None:
        for stream in (subjects.BOOK, SHARD):
            applied = self.warehouse.positions().get(stream, 0)
            if messages := self.broker.stream(stream).messages[applied:]:
                self.warehouse.apply(stream, messages)

    async def correct(self, *, leaders: int = 1, project_s: float = 2.5) -> dict[str, int]:
        """Run the duty of several leaders at once, and return what counts, by request."""
        async with anyio.create_task_group() as tasks:
            for _ in range(leaders):
                duty = UsageCorrection(MemoryLog(self.broker), inline(self.warehouse), shard=0)
                tasks.start_soon(duty.run)
            for _ in range(10):
                self.project()
                await anyio.sleep(project_s)
            tasks.cancel_scope.cancel()
        self.project()
        [result] = self.warehouse.read(("select request_id, nanousd from corrections", []))
        assert len(dict(result.rows)) == len(result.rows), "each once"
        return dict(result.rows)

    def billed(self) -> int:
        [result] = self.warehouse.read(("select coalesce(sum(nanousd), 0) from invoice_lines", []))
        assert list(self.warehouse.failed_checks()) == []
        return int(result.rows[0][0])

    def appended(self) -> list[UsageCorrected]:
        stored = self.broker.stream(subjects.BOOK).messages
        events = [event for message in stored for event in codec.decode(message.data)[1]]
        return [event for event in events if isinstance(event, UsageCorrected)]


def live(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        with closing(Warehouse.open(Path(":memory:"))) as warehouse:
            async with anyio.create_task_group() as tasks:
                await test(World(tasks, warehouse))
                tasks.cancel_scope.cancel()

    clock.run(main)


def test_a_request_that_ended_before_its_cancellation_is_corrected_by_its_charge() -> None:
    async def test(world: World) -> None:
        request = world.begin()
        world.end(request)
        world.cancel(request)
        assert await world.correct() == {request: -32}
        assert world.billed() == 0
        (event,) = world.appended()
        assert (event.account, event.model, event.request) == ("dev", "m", request)

    live(test)


def test_a_request_that_is_read_free_or_unknown_is_not_corrected() -> None:
    async def test(world: World) -> None:
        read, empty, cancelled = world.begin(), world.begin(), world.begin()
        world.end(read)
        world.cancel(read, "disconnect")
        world.end(empty, tokens=0)
        world.cancel(empty)
        world.cancel(cancelled)
        world.end(cancelled)
        entropy = world.dice.randbytes(ids.RANDOM_BYTES)
        unknown = ids.new_request_id(secret=b"secret", account="dev", at=AT, floor=0, entropy=entropy)
        world.cancel(unknown)
        assert await world.correct() == {}
        assert world.billed() == 32

    live(test)


def test_a_request_that_ends_later_is_corrected_if_another_cancellation_came_first() -> None:
    async def test(world: World) -> None:
        request = world.begin()
        world.cancel(request, "disconnect")
        world.cancel(request)
        assert await world.correct() == {}
        world.end(request)
        assert await world.correct() == {request: -32}
        assert world.billed() == 0

    live(test)


def test_a_correction_is_made_once_by_several_leaders_and_the_next_ones() -> None:
    async def test(world: World) -> None:
        requests = [world.begin() for _ in range(3)]
        for request in requests:
            world.end(request)
            for _ in range(3):
                world.cancel(request)
        expected = dict.fromkeys(requests, -32)
        assert await world.correct(leaders=3) == expected
        before = len(world.appended())
        assert await world.correct(leaders=2) == expected
        assert len(world.appended()) == before

    live(test)


def test_only_the_choice_that_paid_for_the_prompt_gets_it_back() -> None:
    async def test(world: World) -> None:
        first, second = world.begin(group="g"), world.begin(group="g", choice=1)
        for request in (first, second):
            world.end(request)
            world.cancel(request)
        assert await world.correct() == {first: -32, second: -2}
        assert world.billed() == 0

    live(test)


@pytest.mark.parametrize("unread", [1, 3, 4])
def test_seconds_that_a_read_answer_shares_stay_charged(unread: int) -> None:
    """Four requests run together for two seconds, and the last one for a third one alone."""

    async def test(world: World) -> None:
        requests = [world.begin(plan="per_second") for _ in range(4)]
        await anyio.sleep(1.9)
        for request in requests[:3]:
            world.end(request)
        await anyio.sleep(1.0)
        world.end(requests[3])
        for request in requests[4 - unread :]:
            world.cancel(request)
        corrected = await world.correct(leaders=2)
        assert len(corrected) == unread
        charged_seconds = 0 if unread == 4 else 2
        assert world.billed() == charged_seconds * SECOND
        assert sum(corrected.values()) == -(3 - charged_seconds) * SECOND

    live(test)


def test_seconds_that_two_unread_answers_share_are_corrected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each correction sees the ones before it, also if the projection is late or a next leader makes it."""
    monkeypatch.setattr(usage_correction, "REQUESTS_A_QUERY", 1)

    async def test(world: World) -> None:
        requests = [world.begin(plan="per_second") for _ in range(4)]
        await anyio.sleep(1.9)
        for request in requests:
            world.end(request)
        world.cancel(requests[0])
        assert await world.correct() == {requests[0]: 0}
        for request in requests[1:]:
            world.cancel(request)
        corrected = await world.correct(project_s=15.0)
        assert sum(corrected.values()) == -2 * SECOND
        assert world.billed() == 0

    live(test)


def test_seconds_that_an_older_price_list_was_paid_for_are_not_corrected() -> None:
    async def test(world: World) -> None:
        price = Price(model="m", prompt_nanousd=10, output_nanousd=1, second_nanousd=SECOND + 1)
        world.say(PricePublished(id="p2", version=2, prices=(price,)))
        read, unread = world.begin(plan="per_second"), world.begin(plan="per_second", version=2)
        await anyio.sleep(0.9)
        world.end(read)
        world.end(unread)
        world.cancel(unread)
        assert await world.correct() == {unread: 0}
        assert world.billed() == SECOND

    live(test)


def test_the_end_of_an_open_request_is_awaited() -> None:
    async def test(world: World) -> None:
        request = world.begin()
        world.cancel(request, "disconnect")
        world.cancel(request)

        async def end_later() -> None:
            await anyio.sleep(8.0)
            world.end(request)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(end_later)
            assert await world.correct() == {request: -32}

    live(test)


def test_a_correction_waits_while_the_log_stores_nothing() -> None:
    async def test(world: World) -> None:
        request = world.begin()
        world.end(request)
        world.cancel(request)
        world.broker.is_unwritable = True
        assert await world.correct() == {}
        world.broker.is_unwritable = False
        assert await world.correct() == {request: -32}

    live(test)
