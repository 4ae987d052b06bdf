"""Control settles what lost lanes hold, as far as it can read the book and no further."""

from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import anyio

from events import codec, ids, subjects
from events.memory import MemoryBroker, MemoryLog
from events.schema import (
    AccountOpened,
    AnyEvent,
    AttemptStarted,
    CreditHeld,
    CreditSettled,
    LaneReported,
    Parameters,
    Price,
    PricePublished,
    RequestAccepted,
    RequestFinished,
    TokensGenerated,
)
from events.subjects import Address
from replay.warehouse.warehouse import Warehouse
from rift.control.duties.credit_settlement import CreditSettlement
from tests.simulation import clock
from tests.simulation.corrections import inline

START_NS = 1_700_000_000_000_000_000
SHARD = "RIFT_0"
AT = Address(0, "deadlane", "m")


class World:
    def __init__(self, tasks: anyio.abc.TaskGroup, warehouse: Warehouse) -> None:
        self.broker = MemoryBroker(tasks, lambda: START_NS + int(anyio.current_time() * 1e9))
        self.warehouse = warehouse
        self.settlement = CreditSettlement(MemoryLog(self.broker), inline(warehouse))
        self.say("account.dev", AccountOpened(id="a", account="dev"))
        price = Price(model="m", prompt_nanousd=1, output_nanousd=1, second_nanousd=7)
        self.say("price.list", PricePublished(id="p", version=1, prices=(price,)))

    def say(self, subject: str, *events: AnyEvent) -> None:
        self.broker.store(subjects.BOOK, f"rift.book.{subject}", codec.encode("test", list(events)), None)

    def hold(self, id: str) -> None:
        held = CreditHeld(id=id, account="dev", shard=0, lane=AT.lane, nanousd=1000)
        self.say("credit.dev", held)

    def work(self, *events: AnyEvent) -> None:
        self.broker.store(SHARD, subjects.work(AT), codec.encode("test", list(events)), None)

    async def run_a_second(self, number: int, hold: str) -> None:
        """Have a request of plan per_second answered in a second."""
        entropy = bytes([number]) * ids.RANDOM_BYTES
        request = ids.new_request_id(secret=b"secret", account="dev", at=AT, floor=0, entropy=entropy)
        accepted = RequestAccepted(
            request=request, account="dev", key="k", model="m", kind="inference", input="x",
            parameters=Parameters(), stream=False,
            prompt_tokens_max=9, deadline_ms=1000, price_version=1, plan="per_second", book=2, allowance=hold,
        )  # fmt: skip
        self.broker.store(SHARD, subjects.request(AT), codec.encode("test", [accepted]), None)
        started = AttemptStarted(
            request=request, attempt=f"of-{request}", after=None, resume_index=0, worker="w", prompt_tokens=1,
            accepted_at_ns=0, engine="sim", model_digest="d", delivery="ack",
        )  # fmt: skip
        self.work(started)
        await anyio.sleep(1)
        self.work(TokensGenerated(attempt=f"of-{request}", index=0, token_ids=(1,), text="x"))
        self.work(RequestFinished(request=request, attempt=f"of-{request}", reason="stop", output_tokens=1))

    async def project(self) -> None:
        await anyio.sleep(100)
        data = codec.encode("test", [LaneReported(lane="other")])
        self.broker.store(SHARD, subjects.lane(0, "other"), data, None)
        for stream in (subjects.BOOK, SHARD):
            self.warehouse.apply(stream, self.broker.stream(stream).messages)

    def settled(self) -> dict[str, int]:
        messages = self.broker.stream(subjects.BOOK).messages
        read = [event for stored in messages for event in codec.decode(stored.data)[1]]
        found = [event for event in read if isinstance(event, CreditSettled)]
        assert len({event.hold for event in found}) == len(found), "each once"
        return {event.hold: event.nanousd for event in found}


def live(test: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        with closing(Warehouse.open(Path(":memory:"))) as warehouse:
            async with anyio.create_task_group() as tasks:
                await test(World(tasks, warehouse))
                tasks.cancel_scope.cancel()

    clock.run(main)


def test_overlapping_seconds_are_charged_once_to_each_hold() -> None:
    async def test(world: World) -> None:
        for hold in ("one", "other", "unused"):
            world.hold(hold)
        async with anyio.create_task_group() as tasks:
            for number in range(16):
                tasks.start_soon(world.run_a_second, number, "one" if number else "other")
        await anyio.sleep(5)
        await world.run_a_second(99, "one")
        await world.project()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(world.settlement.run)
            await anyio.sleep(10)
            tasks.cancel_scope.cancel()
        assert world.settled() == {"one": 2 * 7, "other": 7, "unused": 0}

    live(test)


def test_an_unreadable_book_ends_the_settlement() -> None:
    """Control would no longer see its settlements, and would repeat them for ever."""

    async def test(world: World) -> None:
        world.hold("one")
        data = b'{"version":1,"writer":"new","events":[{"type":"FromTheFuture","id":"z"}]}'
        await world.project()
        world.broker.store(subjects.BOOK, "rift.book.x.y", data, None)
        with anyio.fail_after(10):
            await world.settlement.run()
        assert world.settled() == {}

    live(test)
