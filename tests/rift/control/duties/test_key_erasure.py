"""Control erases the keys of content that is not stored once its requests have ended, and no others."""

from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio
import pytest

from events import codec, encryption, ids, subjects
from events.contracts import CONTENT_KEY_GRACE_S, IDEMPOTENCY_S, UNUSED_CONTENT_KEY_S
from events.memory import MemoryBroker, MemoryLog
from events.schema import LaneReported, Parameters, Price, PricePublished, RequestAccepted, RequestFinished
from events.subjects import Address
from replay.warehouse.result import QueryResult
from replay.warehouse.warehouse import Warehouse
from rift.control.duties.key_erasure import ENDED, TICK_S, KeyErasure
from tests.simulation import clock
from tests.simulation.corrections import inline

AT = Address(0, "lane1234", "m")


def name(number: int) -> str:
    entropy = bytes([number]) * ids.RANDOM_BYTES
    return ids.new_request_id(secret=b"secret", account="dev", at=AT, floor=0, entropy=entropy)


def accept(broker: MemoryBroker, number: int) -> str:
    request = name(number)
    accepted = RequestAccepted(
        request=request, account="dev", key="k", model="m", kind="inference", input="",
        parameters=Parameters(), stream=False, prompt_tokens_max=9, deadline_ms=1000, price_version=1,
    )  # fmt: skip
    broker.store("RIFT_0", subjects.request(AT), codec.encode("test", [accepted]), None)
    return request


def end(broker: MemoryBroker, request: str) -> None:
    finished = RequestFinished(request=request, attempt=None, reason="expired", output_tokens=0)
    broker.store("RIFT_0", subjects.work(AT), codec.encode("test", [finished]), None)


class Scene:
    """A log and its projection. The log's clock goes with the test's, and is set on by `later`."""

    def __init__(self, tasks: anyio.abc.TaskGroup, warehouse: Warehouse) -> None:
        self.warehouse, self.ahead_s = warehouse, 0.0
        self.broker = MemoryBroker(
            tasks, lambda: 1_700_000_000_000_000_000 + int((anyio.current_time() + self.ahead_s) * 1e9)
        )
        self.log = MemoryLog(self.broker)
        price = PricePublished(
            id="p", version=1, prices=(Price(model="m", prompt_nanousd=1, output_nanousd=1),)
        )
        self.broker.store(subjects.BOOK, "rift.book.price.list", codec.encode("test", [price]), None)

    async def keep(self, *requests: str, topic: str = subjects.SECRET_PASSING) -> int:
        return await encryption.keep(self.log, topic, encryption.Secret(tuple(requests), b"k" * 32))

    def apply(self) -> None:
        for stream in (subjects.BOOK, "RIFT_0"):
            applied = self.warehouse.positions().get(stream, 0)
            if messages := self.broker.stream(stream).messages[applied:]:
                self.warehouse.apply(stream, messages)

    def later(self, seconds: float) -> None:
        """Advance the clock, append a lane report, and apply it."""
        self.ahead_s += seconds
        lane = LaneReported(lane=AT.lane)
        self.broker.store("RIFT_0", subjects.lane(0, AT.lane), codec.encode("test", [lane]), None)
        self.apply()

    async def left(self, *keys: int) -> list[int]:
        await anyio.sleep(CONTENT_KEY_GRACE_S + 3 * TICK_S)
        return [key for key in keys if await encryption.secret(self.log, key) is not None]


def live(test: Callable[[Scene, anyio.abc.TaskGroup], Awaitable[None]]) -> None:
    async def main() -> None:
        with closing(Warehouse.open(Path(":memory:"))) as warehouse:
            async with anyio.create_task_group() as tasks:
                await test(Scene(tasks, warehouse), tasks)
                tasks.cancel_scope.cancel()

    clock.run(main)


def test_a_key_is_erased_after_its_last_request_by_any_leader() -> None:
    async def test(scene: Scene, tasks: anyio.abc.TaskGroup) -> None:
        broker, log = scene.broker, scene.log
        one, two, three, four = (accept(broker, number) for number in range(4))
        keys = [await scene.keep(one, two), await scene.keep(three)]
        kept = await scene.keep(four, topic=subjects.SECRET_KEPT)

        async def left() -> list[int]:
            scene.apply()
            await anyio.sleep(CONTENT_KEY_GRACE_S - 2 * TICK_S)
            early = [key for key in (*keys, kept) if await encryption.secret(log, key) is not None]
            await anyio.sleep(5 * TICK_S)
            late = [key for key in (*keys, kept) if await encryption.secret(log, key) is not None]
            assert set(late) <= set(early)
            return early if early == late else [*early, 0, *late]

        tasks.start_soon(KeyErasure(log, inline(scene.warehouse)).run)
        assert await left() == [*keys, kept]
        for request in (one, four):
            end(broker, request)
        assert await left() == [*keys, kept], "its sibling is open"
        end(broker, three)
        assert await left() == [*keys, kept, 0, keys[0], kept]
        end(broker, two)
        tasks.start_soon(KeyErasure(MemoryLog(broker), inline(scene.warehouse)).run)
        assert await left() == [keys[0], kept, 0, kept], "two who lead erase the same"

    live(test)


def test_a_key_without_acceptance_is_kept_until_none_can_name_it() -> None:
    assert UNUSED_CONTENT_KEY_S > IDEMPOTENCY_S

    async def test(scene: Scene, tasks: anyio.abc.TaskGroup) -> None:
        done, running = (accept(scene.broker, number) for number in range(2))
        never, late = name(8), name(9)
        end(scene.broker, done)
        keys = [await scene.keep(done, never), await scene.keep(running, never), await scene.keep(late)]
        tasks.start_soon(KeyErasure(scene.log, inline(scene.warehouse)).run)
        scene.later(IDEMPOTENCY_S)
        assert await scene.left(*keys) == keys, "an idempotency key's entry may be read"
        accept(scene.broker, 9)
        scene.ahead_s += UNUSED_CONTENT_KEY_S
        assert await scene.left(*keys) == keys, "an acceptance in between is not applied yet"
        scene.later(0)
        assert await scene.left(*keys) == keys[1:], "the running and the late request keep their keys"
        end(scene.broker, running)
        scene.apply()
        assert await scene.left(*keys) == keys[2:]

    live(test)


def test_many_waiting_keys_are_queried_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rift.control.duties.key_erasure.KEYS_A_TICK", 4)
    asked: list[int] = []

    async def test(scene: Scene, tasks: anyio.abc.TaskGroup) -> None:
        lost = [await scene.keep(name(number)) for number in range(9)]
        request = accept(scene.broker, 9)
        key = await scene.keep(request)
        end(scene.broker, request)
        scene.apply()
        query = inline(scene.warehouse)

        async def counted(*questions: Any) -> list[QueryResult]:
            asked.extend(len(requests) for _, parameters in questions for requests in parameters)
            return await query(*questions)

        tasks.start_soon(KeyErasure(scene.log, counted).run)
        assert await scene.left(*lost, key) == lost
        assert max(asked) == 4
        scene.broker.stream(subjects.SECRETS).trim(lost[-1])
        await anyio.sleep(2 * TICK_S)
        asked.clear()
        await anyio.sleep(2 * TICK_S)
        assert asked == [], "keys that have left the log are not asked for"

    live(test)


def test_keys_of_open_requests_are_not_looked_up_among_all_requests() -> None:
    asked: list[str] = []

    async def test(scene: Scene, tasks: anyio.abc.TaskGroup) -> None:
        key = await scene.keep(accept(scene.broker, 1))
        scene.apply()
        query = inline(scene.warehouse)

        async def noted(*questions: Any) -> list[QueryResult]:
            asked.extend(question for question, _ in questions)
            return await query(*questions)

        tasks.start_soon(KeyErasure(scene.log, noted).run)
        assert await scene.left(key) == [key]
        assert asked
        assert ENDED not in asked

    live(test)
