"""Control erases the keys of what nobody wants stored once their requests have ended, and no others."""

from contextlib import closing
from pathlib import Path
from typing import Any

import anyio

from events import codec, ids, sealing, subjects
from events.memory import MemoryBroker, MemoryLog
from events.schema import Parameters, Price, PricePublished, RequestAccepted, RequestFinished
from events.subjects import Address
from replay.warehouse import Warehouse
from rift.control.shredding import GRACE_S, TICK_S, Shredding
from tests.simulation import clock

AT = Address(0, "lane1234", "m")


class Inline(Shredding):
    """There are no threads on a clock that jumps."""

    async def _ask(self, select: str) -> list[list[Any]]:
        return self._warehouse().query(select).rows


def accept(broker: MemoryBroker, number: int) -> str:
    entropy = bytes([number]) * ids.RANDOM_BYTES
    request = ids.new_request_id(secret=b"secret", account="dev", at=AT, floor=0, entropy=entropy)
    accepted = RequestAccepted(
        request=request, account="dev", key="k", model="m", kind="inference", input="",
        parameters=Parameters(), stream=False, prompt_tokens_max=9, deadline_ms=1000, price_version=1,
    )  # fmt: skip
    broker.store("RIFT_0", subjects.request(AT), codec.encode("test", [accepted]), None)
    return request


def end(broker: MemoryBroker, request: str) -> None:
    finished = RequestFinished(request=request, attempt=None, reason="expired", output_tokens=0)
    broker.store("RIFT_0", subjects.work(AT), codec.encode("test", [finished]), None)


def test_a_key_goes_after_its_last_request_whoever_leads_by_then() -> None:
    async def test(tasks: anyio.abc.TaskGroup, warehouse: Warehouse) -> None:
        broker = MemoryBroker(tasks, lambda: 1_700_000_000_000_000_000 + int(anyio.current_time() * 1e9))
        log = MemoryLog(broker)
        price = PricePublished(
            id="p", version=1, prices=(Price(model="m", prompt_nanousd=1, output_nanousd=1),)
        )
        broker.store(subjects.BOOK, "rift.book.price.list", codec.encode("test", [price]), None)
        one, two, three, four = (accept(broker, number) for number in range(4))
        named = ((subjects.SECRET_PASSING, [one, two]), (subjects.SECRET_PASSING, [three]))
        keys = [await sealing.keep(log, topic, requests, b"k" * 32) for topic, requests in named]
        kept = await sealing.keep(log, subjects.SECRET_KEPT, [four], b"k" * 32)

        async def left() -> list[int]:
            for stream in (subjects.BOOK, "RIFT_0"):
                applied = warehouse.positions().get(stream, 0)
                if messages := broker.stream(stream).messages[applied:]:
                    warehouse.apply(stream, messages)
            await anyio.sleep(GRACE_S - 2 * TICK_S)
            early = [key for key in (*keys, kept) if await sealing.secret(log, key) is not None]
            await anyio.sleep(5 * TICK_S)
            late = [key for key in (*keys, kept) if await sealing.secret(log, key) is not None]
            assert set(late) <= set(early)
            return early if early == late else [*early, 0, *late]

        tasks.start_soon(Inline(log, lambda: warehouse).run)
        assert await left() == [*keys, kept]
        for request in (one, four):
            end(broker, request)
        assert await left() == [*keys, kept], "its sibling is open"
        end(broker, three)
        assert await left() == [*keys, kept, 0, keys[0], kept]
        end(broker, two)
        tasks.start_soon(Inline(MemoryLog(broker), lambda: warehouse).run)
        assert await left() == [keys[0], kept, 0, kept], "two who lead erase the same"

    async def main() -> None:
        with closing(Warehouse.open(Path(":memory:"))) as warehouse:
            async with anyio.create_task_group() as tasks:
                await test(tasks, warehouse)
                tasks.cancel_scope.cancel()

    clock.run(main)
